"""PyTorch's side computes what the original computes, and what ours does: else it would be no baseline."""

import jax
import numpy as np
import programs
import pytest
from original import Original
from pytorch import import_torch

from clipcap_jax.convert import clip
from clipcap_jax.convert.original import to_arrays

torch = import_torch()
import baselines  # noqa: E402


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_the_originals_loss_and_gradients(kind: str) -> None:
    original = Original.load(kind)
    arrays = original.arrays
    state = {name: array for name, array in original.state.items() if name != "gpt.lm_head.weight"}
    model = baselines.Captioner(original.config, state, arrays["clip_embedding"].shape[1]).eval()
    inputs, tokens = torch.tensor(arrays["clip_embedding"]), torch.tensor(arrays["tokens"]).long()
    losses = model.loss(inputs, tokens), model.lean_loss(inputs, tokens)
    for loss in losses:
        np.testing.assert_allclose(loss.item(), arrays["loss"], rtol=1e-5)
    losses[0].backward()
    for name, expected in original.part("grad/").items():
        found = model.get_parameter(name).grad
        assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize(("trains_gpt2", "learns"), [(True, {"clip_project", "gpt"}), (False, {"clip_project"})])
def test_a_step_learns_what_the_variant_learns(trains_gpt2: bool, learns: set[str]) -> None:
    model = programs.captioner("mlp", "tiny", dtype="float32")
    arrays = to_arrays(model.config, programs.random_params(programs.param_shapes(model)))
    theirs = baselines.Captioner(model.config, arrays, programs.EMBEDDING)
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    batch = programs.random_batch(model, 4, 14)
    step = baselines.training_step(theirs, batch, 39, trains_gpt2=trains_gpt2, compiled=False, autocast=False)
    step()
    changed = {name.split(".")[0] for name, parameter in theirs.named_parameters() if (parameter != before[name]).any()}
    assert changed == learns


def test_searches_find_the_same_captions() -> None:
    model = programs.captioner("mlp", "tiny", dtype="float32")
    params = programs.random_params(programs.param_shapes(model))
    theirs = baselines.Captioner(model.config, to_arrays(model.config, params), programs.EMBEDDING).eval()
    embeddings = programs.random_embeddings(3)
    ours = np.asarray(jax.jit(programs.best_captions(model, 5, 8))(params, embeddings).tokens)
    rows = torch.from_numpy(embeddings)
    assert [theirs.search(row[None], 5, 8).tolist() for row in rows] == ours.tolist()
    assert theirs.generate(rows, 5, 8).tolist() == ours.tolist()


@pytest.mark.parametrize("name", ["tiny ViT", "tiny ResNet"])
def test_towers(name: str) -> None:
    config = programs.TOWERS[name]
    theirs = baselines.Tower(config)
    found, params = clip.from_arrays(theirs.arrays(), "a test", config.heads)
    assert found == config
    pixels = np.random.default_rng(0).integers(0, 256, (2, config.image_size, config.image_size, 3), np.uint8)
    ours = np.asarray(jax.jit(programs.embed_pictures(config, "float32"))(params, pixels))
    expected = theirs(torch.from_numpy(pixels)).numpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
