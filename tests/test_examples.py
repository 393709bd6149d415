"""The examples of clusters are YAML that a run takes, and scripts that a shell takes."""

import subprocess
from pathlib import Path

import pytest
import yaml

from segpipe.pipeline.cluster_kinds import dask_settings
from segpipe.pipeline.config import load_city

FOLDER = Path(__file__).parent.parent / "conf" / "cluster"


@pytest.mark.parametrize("kind", ["scheduler", "slurm", "class"])
def test_an_example_of_each_kind_is_a_citys_yaml(kind: str) -> None:
    assert load_city(FOLDER / f"{kind}.yaml").cluster.kind == kind


def test_the_yaml_in_the_job_for_kubernetes_is_a_citys(tmp_path: Path) -> None:
    config, job = yaml.safe_load_all((FOLDER / "kubernetes-job.yaml").read_text())
    (tmp_path / "city.yaml").write_text(config["data"]["city.yaml"])
    assert load_city(tmp_path / "city.yaml").output.startswith("s3://")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    writable = [it["mountPath"] for it in container["volumeMounts"] if not it.get("readOnly")]
    assert writable == ["/cache"]
    assert container["args"][:2] == ["run", "/city/city.yaml"]


@pytest.mark.parametrize("script", sorted(it.name for it in FOLDER.glob("*.sbatch")))
def test_a_script_is_one_that_a_shell_takes(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / script)], check=False).returncode == 0


def test_schedulers_of_others_are_told_what_our_own_are() -> None:
    told = yaml.safe_load((FOLDER / "dask.yaml").read_text())

    def flat(values: dict[str, object], before: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in values.items():
            found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
        return found

    ours = dask_settings(1)
    assert flat(told) == {key: ours[key] for key in flat(told)}
