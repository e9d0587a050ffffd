"""What a trained model looks at and where it errs, as numbers; figures.py draws them.

In the comments on shapes, beside the letters of vit_model.py,

    L: blocks (layers)     n: images of a test set     K: classes     side: sqrt(N)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils import BatchLoader
from vit_model import Attention, ViT

# ------------------------------------------------------------------------------------- attention


@torch.no_grad()
def attention_weights(model: ViT, images: Tensor) -> Tensor:
    """The attention weights of every block and head, softmax(q k^T / sqrt(D / H)), without dropout.

    The blocks are run one after the other on what they really read. No hook is set: the model stays
    as it is, and may answer other threads meanwhile.

    Args:
        images: normalised, (B, C, img_size, img_size), on the model's device.

    Returns:
        fp32 (B, L, H, T, T): the row of each query token sums to 1 over the key tokens.
    """
    weights = []
    with _evaluating(model):
        x = model.embed(images)
        for block in model.blocks:
            weights.append(_weights(block.attn, block.norm1(x)))
            x = block(x)
    return torch.stack(weights, dim=1)


def rollout(attention: Tensor) -> Tensor:
    """Attention rollout: how much of each input token reaches each token of the last block.

    The heads are averaged, the residual connection counts as much as the attention, 0.5 A + 0.5 I,
    and the blocks' matrices are multiplied.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3.

    Shape: (B, L, H, T, T) -> (B, T, T), rows that sum to 1.
    """
    mean = attention.mean(dim=2)  # (B, L, T, T)
    flow = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    flow = flow / flow.sum(dim=-1, keepdim=True)
    total = flow[:, 0]
    for layer in flow.unbind(dim=1)[1:]:
        total = layer @ total
    return total


def patch_map(matrices: Tensor, model: ViT) -> Tensor:
    """What the head's input takes from each patch: attention weights or a rollout as a map.

    With a CLS token that is its row, without its own column, so a map sums to 1 less what CLS keeps
    for itself. With `pool="mean"` the head reads the mean of the tokens, so the mean over the
    query rows takes the row's place.

    Shape: (..., T, T) -> (..., side, side), for (B, L, H, T, T) and (B, T, T) alike.
    """
    row = matrices[..., 0, 1:] if model.pool == "cls" else matrices.mean(dim=-2)  # (..., N)
    side = model.patch_embed.img_size // model.patch_embed.proj.kernel_size[0]
    return row.unflatten(-1, (side, side))


def _weights(attn: Attention, x: Tensor) -> Tensor:
    """The weights (B, H, T, T) with which `attn` reads its input x (B, T, D)."""
    B, T, D = x.shape
    heads, width = attn.num_heads, D // attn.num_heads
    qk = F.linear(x, attn.in_proj_weight[: 2 * D], attn.in_proj_bias[: 2 * D])  # (B, T, 2D)
    q, k = qk.view(B, T, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D/H)
    return (q * width**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)


@contextmanager
def _evaluating(model: ViT) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# -------------------------------------------------------------------------- a model on a test set


@dataclass(frozen=True)
class Outputs:
    """What a model makes of a test set, image by image."""

    features: np.ndarray  # (n, D): what the head reads
    logits: np.ndarray  # (n, K)
    labels: np.ndarray  # (n,)
    temperature: float = 1.0  # of the probabilities

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits over the temperature, (n, K)."""
        return torch.from_numpy(self.logits).div(self.temperature).softmax(dim=1).numpy()

    @property
    def cross_entropy(self) -> float:
        """The mean negative log-likelihood of the labels, in nats."""
        own = np.take_along_axis(self.probabilities, self.labels[:, None], axis=1)
        return -float(np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())

    @property
    def predicted(self) -> np.ndarray:
        """The most probable classes, (n,)."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """The probabilities of the predicted classes, (n,)."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Where the prediction is right, bool (n,)."""
        return self.predicted == self.labels


@torch.no_grad()
def outputs(model: ViT, loader: BatchLoader, temperature: float = 1.0) -> Outputs:
    """Run a model over all images of a loader, on its device, in fp32 and without dropout.

    Args:
        temperature: of the probabilities, as `confidence.fit` finds it.
    """
    parts = []
    bar = tqdm(loader, desc="test images", unit="batch", leave=False, disable=None)
    with _evaluating(model):
        for images, labels in bar:
            read = model.features(images)
            parts.append((read, model.head(read), labels))
    columns = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Outputs(*columns, temperature)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (K, K) of images: the true class is the row, the predicted one the column."""
    pairs = labels * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Per class `precision`, `recall` and `f1`, each (K,) in [0, 1]; 0 where they are undefined.

    Precision: of the images taken for the class, the share that is of it. Recall: of the images
    of the class, the share taken for it. F1: their harmonic mean.
    """
    hits = np.diag(confusion).astype(float)
    taken, there = confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        "precision": hits / np.maximum(taken, 1),
        "recall": hits / np.maximum(there, 1),
        "f1": 2 * hits / np.maximum(taken + there, 1),
    }


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy agree, by bins of equal width over the confidence."""

    counts: np.ndarray  # (bins,): images in the bin
    confidence: np.ndarray  # (bins,): their mean confidence, 0 where there are none
    accuracy: np.ndarray  # (bins,): the share of them that is right, 0 where there are none

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean of |accuracy - confidence| over the images' bins."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(gaps @ self.counts / self.counts.sum())

    @property
    def interval(self) -> np.ndarray:
        """95 % confidence interval of `accuracy`, low and high ends, (2, bins) (Wilson, 1927)."""
        n, z = np.maximum(self.counts, 1), 1.96
        middle = (self.accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(self.accuracy * (1 - self.accuracy) / n + z**2 / (4 * n**2))
        return np.stack((middle - half / (1 + z**2 / n), middle + half / (1 + z**2 / n)))


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Sort predictions by confidence into bins ((m - 1) / bins, m / bins].

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), equations 2, 3 and 5,
    with its 15 bins.

    Args:
        confidence: the probability of the predicted class, (n,).
        correct: whether it is right, (n,).
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    divisor = np.maximum(counts, 1)
    return Calibration(
        counts,
        np.bincount(index, weights=confidence, minlength=bins) / divisor,
        np.bincount(index, weights=correct, minlength=bins) / divisor,
    )


# ------------------------------------------------------------------------------------- embeddings


def position_similarity(model: ViT) -> np.ndarray:
    """Cosine similarity of the patches' position embeddings, (side, side, side, side): [i, j] is
    the map for the patch in row i and column j (ViT, figure 7, centre). CLS is left out."""
    vectors = model.pos_embed.detach()[0, -model.patch_embed.num_patches :].float()  # (N, D)
    vectors = F.normalize(vectors, dim=1)
    side = model.patch_embed.img_size // model.patch_embed.proj.kernel_size[0]
    return (vectors @ vectors.T).view(side, side, side, side).cpu().numpy()


def filter_components(model: ViT, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of the patch embedding's filters (ViT, figure 7, left).

    Returns:
        The first `count` components or all, (count, patch_size, patch_size), of the mean over the
        image's channels, and each one's share of the filters' variance, (count,).
    """
    filters = model.patch_embed.proj.weight.detach().float().mean(dim=1).cpu()  # (D, P, P)
    rows = filters.flatten(1).double().numpy()
    _, scales, components = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    shares = scales**2 / max(float((scales**2).sum()), np.finfo(float).tiny)
    return components[:count].reshape(-1, *filters.shape[1:]), shares[:count]


def project(vectors: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Maps of vectors (n, D) to the plane, each (n, 2): `PCA` and `t-SNE` (van der Maaten &
    Hinton, 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return {
        "PCA": PCA(n_components=2, random_state=seed).fit_transform(vectors),
        "t-SNE": tsne.fit_transform(vectors),
    }
