"""Where torchvision is installed, our encoders against its own. It cannot be imported beside a torch for CPUs alone."""

import pytest
from test_networks import ENCODERS, on_meta

models = pytest.importorskip("torchvision.models", exc_type=ImportError)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_keys_and_shapes_of_torchvisions(name: str) -> None:
    network = on_meta(name)
    theirs = getattr(models, network.published_encoder)().state_dict()
    used = {network.own_key(key): t.shape for key, t in theirs.items() if not key.startswith(network.unused_prefixes)}
    own = {key: t.shape for key, t in network.state_dict().items() if key.startswith(network.encoder_prefix)}
    assert used == own
