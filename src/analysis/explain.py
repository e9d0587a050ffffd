"""What a trained model looks at and where it is wrong, as numbers; the two *_figures.py draw them.

In the comments on shapes, beside the letters of vit_model.py,

    L: blocks (layers)     n: images of a test set     K: classes     side: sqrt(N)
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt

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
    """The attention weights of every block and head, softmax(q k^T / sqrt(D / H)).

    Each block gets the input that it has in a forward pass. No hook is set: the model stays as it
    is and can serve other threads meanwhile.

    Args:
        model: in evaluation mode.
        images: normalised, (B, C, img_size, img_size), on the model's device.

    Returns:
        fp32 (B, L, H, T, T): the row of each query token sums to 1 over the key tokens.
    """
    weights = []
    x = model.embed(images)
    for block in model.blocks:
        weights.append(_weights_of_block(block.attn, block.norm1(x)))
        x = block(x)
    return torch.stack(weights, dim=1)


def rollout(attention: Tensor) -> Tensor:
    """Attention rollout: how much of each input token reaches each token of the last block.

    The heads are averaged to A, the residual connection is given the same weight, 0.5 A + 0.5 I,
    and these matrices are multiplied from the first block to the last.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3.

    Shape: (B, L, H, T, T) -> (B, T, T), rows that sum to 1.
    """
    mean = attention.mean(dim=2)  # (B, L, T, T)
    flow = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    total = flow[:, 0]
    for layer in flow.unbind(dim=1)[1:]:
        total = layer @ total
    return total


def patch_map(matrices: Tensor, model: ViT) -> Tensor:
    """Attention weights or a rollout as a map: how much the head's input takes from each patch.

    With a CLS token this is the row of CLS without its own column, so that a map sums to 1 less
    what CLS keeps for itself. With `pool="mean"` the head reads the mean of the tokens, so it is
    the mean of the query rows.

    Shape: (..., T, T) -> (..., side, side), for (B, L, H, T, T) and (B, T, T) alike.
    """
    row = matrices[..., 0, 1:] if model.pool == "cls" else matrices.mean(dim=-2)  # (..., N)
    side = isqrt(row.shape[-1])
    return row.unflatten(-1, (side, side))


def _weights_of_block(attn: Attention, x: Tensor) -> Tensor:
    """The attention weights (B, H, T, T) of a block for its input x (B, T, D)."""
    B, T, D = x.shape
    heads, width = attn.num_heads, D // attn.num_heads
    qk = F.linear(x, attn.in_proj_weight[: 2 * D], attn.in_proj_bias[: 2 * D])  # (B, T, 2D)
    q, k = qk.view(B, T, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D/H)
    return (q * width**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)


# -------------------------------------------------------------------------- a model on a test set


@dataclass(frozen=True)
class Outputs:
    """What a model computes for each image of a test set, and the scores that follow from it."""

    features: np.ndarray  # (n, D): what the head reads
    logits: np.ndarray  # (n, K)
    labels: np.ndarray  # (n,)
    temperature: float = 1.0  # the logits are divided by it before the softmax

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits divided by the temperature, (n, K)."""
        return torch.from_numpy(self.logits).div(self.temperature).softmax(dim=1).numpy()

    @property
    def cross_entropy(self) -> float:
        """The mean negative log-likelihood of the labels, in nats."""
        logits = torch.from_numpy(self.logits).double() / self.temperature
        return F.cross_entropy(logits, torch.from_numpy(self.labels)).item()

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
        """Whether each prediction is correct, bool (n,)."""
        return self.predicted == self.labels

    @property
    def confusion(self) -> np.ndarray:
        """Counts of images (K, K): the true class is the row, the predicted class the column."""
        from sklearn.metrics import confusion_matrix  # here, because the import takes seconds

        classes = np.arange(self.logits.shape[1])
        return confusion_matrix(self.labels, self.predicted, labels=classes)

    @property
    def class_scores(self) -> np.ndarray:
        """Precision, recall and F1 of each class, (K, 3) in [0, 1]; NaN where undefined."""
        from sklearn.metrics import precision_recall_fscore_support as scores

        classes = np.arange(self.logits.shape[1])
        columns = scores(self.labels, self.predicted, labels=classes, zero_division=np.nan)[:3]
        return np.stack(columns, axis=1)


@torch.no_grad()
def outputs(model: ViT, loader: BatchLoader, temperature: float = 1.0) -> Outputs:
    """Run a model, in evaluation mode, on all images of a loader, on its device, in fp32."""
    parts = []
    for images, labels in tqdm(loader, "test images", unit="batch", leave=False, disable=None):
        features = model.features(images)
        parts.append((features, model.head(features), labels))
    columns = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Outputs(*columns, temperature)


@dataclass(frozen=True)
class Reliability:
    """How well confidence matches accuracy, in bins of equal width over the confidence."""

    counts: np.ndarray  # (bins,): images in each bin
    correct: np.ndarray  # (bins,): how many of them are classified correctly
    confidence: np.ndarray  # (bins,): their mean confidence, 0 in an empty bin

    @property
    def accuracy(self) -> np.ndarray:
        """The share of each bin's images that is classified correctly, 0 in an empty bin."""
        return self.correct / np.maximum(self.counts, 1)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: |accuracy - confidence| of the bins, weighted by images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(gaps @ self.counts / self.counts.sum())


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Reliability:
    """Sort predictions by confidence into the bins ((m - 1) / bins, m / bins].

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), equations 2, 3 and 5.

    Args:
        confidence: the probability of the predicted class, (n,).
        correct: whether it is the true class, bool (n,).
        bins: 15 in the paper.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    hits = np.bincount(index[correct], minlength=bins)
    totals = np.bincount(index, weights=confidence, minlength=bins)
    return Reliability(counts, hits, totals / np.maximum(counts, 1))


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, both ends in [0, 1] (Wilson, 1927)."""
    from scipy.stats import binomtest  # here, because the import takes seconds

    return tuple(binomtest(correct, count).proportion_ci(0.95, method="wilson"))


# ------------------------------------------------------------------------------------- embeddings


def position_similarity(model: ViT) -> np.ndarray:
    """Cosine similarity of the patches' position embeddings, (side, side, side, side).

    [i, j] is the map for the patch in row i and column j (ViT, figure 7, centre). CLS is left out.
    """
    vectors = model.pos_embed.detach()[0, -model.patch_embed.num_patches :].float()  # (N, D)
    vectors = F.normalize(vectors, dim=1)
    side = isqrt(model.patch_embed.num_patches)
    return (vectors @ vectors.T).view(side, side, side, side).cpu().numpy()


def filter_components(model: ViT, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of the patch embedding's filters (ViT, figure 7, left).

    Returns:
        The first `count` components of the filters, or all if there are fewer,
        (count, C, patch_size, patch_size); and the share of the filters' variance that each
        explains, (count,).
    """
    filters = model.patch_embed.proj.weight.detach().float().cpu()  # (D, C, P, P)
    rows = filters.flatten(1).double().numpy()
    _, scales, components = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    shares = scales**2 / max(float((scales**2).sum()), np.finfo(float).tiny)
    return components[:count].reshape(-1, *filters.shape[1:]), shares[:count]


def project(vectors: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Vectors (n, D) projected to the plane, (n, 2) each, by `PCA` and by `t-SNE` (van der Maaten &
    Hinton, 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if min(vectors.shape) < 2 or (vectors == vectors[0]).all():  # which t-SNE dies of
        return dict.fromkeys(("PCA", "t-SNE"), np.zeros((len(vectors), 2)))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return {
        "PCA": PCA(n_components=2, random_state=seed).fit_transform(vectors),
        "t-SNE": tsne.fit_transform(vectors),
    }
