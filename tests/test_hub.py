"""hubconf.py: the pretrained model by torch.hub, in a program that has PyTorch alone."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

from data.digits import load_digits
from deploy.predict import normalize, predict
from saving.checkpoint import PRETRAINED, load_checkpoint

pytestmark = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")
# Whoever uses the model may have none of these packages, and modules named like ours.
USER_SCRIPT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
model = torch.hub.load(sys.argv[1], "vit_mnist", source="local")
images = torch.load("images.pt")
torch.save((model(model.transforms(images)), model.temperature), "answers.pt")
"""
ABSENT = "numpy matplotlib tqdm torchvision PIL scipy sklearn safetensors filelock"
ABSENT += " vit_model data common saving utils settings"


@pytest.fixture(scope="module")
def hub() -> torch.nn.Module:
    return torch.hub.load(str(ROOT), "vit_mnist", source="local")


def test_hub_gives_the_pretrained_model_where_there_is_pytorch_alone(tmp_path):
    images = load_digits().test.images
    torch.save(images[:, 0], tmp_path / "images.pt")
    command = [sys.executable, "-c", USER_SCRIPT, ROOT, ABSENT]
    subprocess.run(command, cwd=tmp_path, check=True)
    logits, temperature = torch.load(tmp_path / "answers.pt")
    model, checkpoint = load_checkpoint(PRETRAINED)
    with torch.no_grad():
        expected = model(normalize(images, checkpoint))
    assert (logits - expected).abs().max() < 1e-5
    assert temperature == checkpoint["calibration"]["temperature"]


def test_pictures_and_arrays_become_what_the_model_takes(hub):
    picture = Image.new("RGB", (280, 280), "white")
    ImageDraw.Draw(picture).line([(90, 70), (190, 70), (130, 220)], "navy", 24)
    small = np.array(picture.convert("L").resize((28, 28)))
    x = hub.transforms(picture)
    assert (x.shape, x.dtype, hub.training) == ((1, 1, 28, 28), torch.float32, False)
    for same in (small, 255 - small, torch.from_numpy(small), Image.fromarray(255 - small)):
        assert torch.equal(hub.transforms(same), x)
    assert torch.equal(hub.transforms(np.stack([small, 255 - small])), torch.cat((x, x)))
    ink = Image.new("RGBA", picture.size, (0, 0, 0, 0))  # on nothing, which is black
    ink.paste(picture, mask=picture.convert("L").point(lambda light: 255 * (light < 255)))
    assert torch.equal(hub.transforms(ink), x)
    probabilities = (hub(x) / hub.temperature).softmax(dim=1)
    model, checkpoint = load_checkpoint(PRETRAINED)
    expected = predict(model, 255 - small[None, None], checkpoint).probabilities
    assert np.abs(probabilities.detach().numpy() - expected).max() < 1e-5
    assert probabilities.argmax() == 7
    for odd in (small / 255, small[:-1], small.astype(np.int64)):
        with pytest.raises(ValueError, match=r"expected a PIL image, or uint8 of \(28, 28\), got"):
            hub.transforms(odd)
    with pytest.raises(ValueError, match="8 bits a value, got mode I;16"):
        hub.transforms(Image.new("I;16", (28, 28)))


def test_a_clone_in_the_cache_offers_one_name_and_says_what_it_is(tmp_path, monkeypatch):
    """What torch.hub does with OWNER/REPO once it has fetched it."""
    clone = tmp_path / "hub" / "OWNER_REPO_main"
    for name in ("src", "checkpoints/pretrained"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, clone / name, ignore=skipped)
    shutil.copy(ROOT / "hubconf.py", clone)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    repo = {"github": "OWNER/REPO:main", "trust_repo": True}
    assert torch.hub.list(**repo, verbose=False) == ["vit_mnist"]
    assert "logits (B, 10)" in torch.hub.help(**repo, model="vit_mnist")
    model = torch.hub.load("OWNER/REPO:main", "vit_mnist", trust_repo=True, verbose=False)
    assert sum(p.numel() for p in model.parameters()) == 1_197_578
