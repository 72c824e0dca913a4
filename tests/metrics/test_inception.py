"""The Inception network in its published forms: what it sees is what the published tools show it."""

import warnings

import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image
from torchvision.transforms import Resize

from metrics.base import NotAvailable
from metrics.inception import SOURCES, STATE_DICT, TORCHSCRIPT, Inception, batches
from metrics.weights import quiet


@pytest.fixture(scope="module")
def network(torchscript, state_dict):
    """network(form): loaded once."""
    made = {}

    def of(form):
        if form not in made:
            path = torchscript if form in ("clean", "legacy_tensorflow") else state_dict
            made[form] = Inception(form, weights=path, batch_size=3).to("cpu")
        return made[form]

    return of


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures")
    for place, picture in enumerate(pictures(3)):
        Image.fromarray(picture).save(made / f"{place}.png")
    return made


@pytest.mark.parametrize("form", ["clean", "legacy_tensorflow", "legacy_pytorch"])
def test_features_are_those_of_clean_fid(network, pictures, folder, form, torchscript, state_dict, monkeypatch):
    """clean-fid's own builder opens the files where it looks for them, and its own loader resizes the pictures."""
    from cleanfid import features, inception_pytorch

    stored = torch.load(state_dict, weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: stored)
    opened = features.InceptionV3W
    monkeypatch.setattr(
        features, "InceptionV3W", lambda path, download, **given: opened(torchscript.parent, False, **given)
    )
    with quiet():
        model = features.build_feature_extractor(form, torch.device("cpu"), use_dataparallel=False)
        theirs = fid.get_folder_features(
            str(folder), model, num_workers=0, batch_size=2, device=torch.device("cpu"), mode=form, verbose=False
        )
    mine = network(form).features(pictures(3))
    assert mine.shape == (3, 2048)
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * theirs.std(), rtol=0)
    assert theirs.std(axis=0).max() > 1e-3  # pictures are told apart


def test_features_of_laion_sg_are_those_of_its_script(network, pictures):
    """Resized to 256 px without antialiasing, normalised, and normalised again by pytorch-fid after its own resizing."""
    shown = torch.from_numpy(np.stack(pictures(2))).permute(0, 3, 1, 2).float() / 255
    shown = Resize((256, 256), antialias=False)(shown) * 2 - 1
    shown = torch.nn.functional.interpolate(shown, size=(299, 299), mode="bilinear", align_corners=False)
    x = 2 * shown - 1
    with torch.inference_mode():
        for block in network("laion_sg").network.blocks:
            x = block(x)
    mine = network("laion_sg").features(pictures(2))
    np.testing.assert_allclose(mine, x.flatten(1), atol=1e-4 * float(x.std()), rtol=0)
    other = network("legacy_pytorch").features(pictures(2))
    assert np.abs(mine - other).mean() > 0.1 * np.abs(other).mean()


@pytest.mark.parametrize("form", ["clean", "legacy_tensorflow"])
def test_a_picture_has_the_same_features_in_any_company(network, pictures, form):
    mixed = [*pictures(3), *pictures(2, seed=1, size=(30, 61)), *pictures(1, seed=2)]
    together = network(form).features(mixed)
    alone = np.concatenate([network(form).features([picture]) for picture in mixed])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_pictures_go_through_the_network_in_groups_of_one_size():
    images = [np.empty((4, 4, 3)), np.empty((5, 4, 3)), np.empty((4, 4, 3)), np.empty((4, 4, 3))]
    assert list(batches(images, 2, by_size=True)) == [[0, 2], [3], [1]]
    assert list(batches(images, 3, by_size=False)) == [[0, 1, 2], [3]]


def test_probabilities_leave_the_classifier_s_bias_out(network, pictures):
    form = network("legacy_tensorflow")
    found = form.probabilities(pictures(4))
    logits = form.features(pictures(4)) @ form.network.base.output.weight.detach().numpy().T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, odds / odds.sum(axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match="mode: clean has no classifier"):
        network("clean").probabilities(pictures(1))


@pytest.mark.parametrize(("form", "name"), [("clean", TORCHSCRIPT), ("laion_sg", STATE_DICT)])
def test_weights_that_are_not_there_are_named_with_their_source_and_setting(form, name, tmp_path, monkeypatch):
    missing = Inception(form, weights=tmp_path / "none.pt", setting="metric.fid.weights")
    with pytest.raises(NotAvailable) as error:
        missing.to("cpu")
    assert str(tmp_path / "none.pt") in str(error.value)
    assert SOURCES[name] in str(error.value)
    assert "metric.fid.weights=FILE" in str(error.value)
    assert missing.settings() == {"mode": form, "weights": name, "sha256": None}
    with pytest.raises(NotAvailable, match=str(tmp_path / name)):  # a folder is searched for the published name
        Inception(form, weights=tmp_path).to("cpu")


def test_weights_are_looked_for_where_torch_hub_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NotAvailable, match=str(tmp_path / "hub" / "checkpoints" / STATE_DICT)):
        Inception("legacy_pytorch").to("cpu")
    kept = tmp_path / "hub" / "checkpoints" / STATE_DICT
    kept.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(2)}, kept)
    with pytest.raises(NotAvailable, match="not the network of mode legacy_pytorch"):
        Inception("legacy_pytorch").to("cpu")


def test_loading_leaves_warnings_as_they_were(torchscript, pictures):
    before = list(warnings.filters)
    Inception("clean", weights=torchscript).features(pictures(1))
    Inception("clean", weights=torchscript).settings()
    assert warnings.filters == before


def test_settings_name_the_weights_by_hash(torchscript, state_dict):
    scripted, stored = (
        Inception("clean", weights=torchscript).settings(),
        Inception("laion_sg", weights=state_dict).settings(),
    )
    assert scripted["sha256"] != stored["sha256"]
    assert len(scripted["sha256"]) == 64


def test_unknown_forms_and_no_batches_are_refused():
    with pytest.raises(ValueError, match="mode: cleaned is no form"):
        Inception("cleaned")
    with pytest.raises(ValueError, match="batch_size: 0"):
        Inception("clean", batch_size=0)
