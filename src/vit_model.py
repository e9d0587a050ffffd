"""The Vision Transformer: images in, class logits out.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), https://arxiv.org/abs/2010.11929,
cited below as "ViT". Each class is one idea, in the order in which an image meets them. In the
comments on shapes

    B: images in a batch     N: patches of an image            D: embed_dim, the width of a token
    C: channels              T: tokens, N + 1 with CLS         H: attention heads, each D / H wide

With `pool="mean"` there is no CLS token, and T = N.

Run this file to see the default network's output shape and number of parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut the image into square patches and project each linearly to a token (ViT, eq. 1).

    A convolution whose stride equals its kernel is exactly that: one matrix applied to every patch.

    Shape: (B, C, img_size, img_size) -> (B, N, D), N = (img_size / patch_size)^2, row by row.

    Raises:
        ValueError: `patch_size` does not divide `img_size`.
    """

    def __init__(
        self, img_size: int = 28, patch_size: int = 7, in_chans: int = 1, embed_dim: int = 96
    ) -> None:
        super().__init__()
        if img_size % patch_size != 0:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        self.img_size = img_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"expected images of {self.img_size}x{self.img_size}, got {tuple(x.shape)}"
            )
        x = self.proj(x)  # (B, D, img_size / patch_size, img_size / patch_size)
        # Every later sum keeps this layout, and norms are slow in another.
        return x.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


def random_words(n: int) -> Tensor:
    """n random 32-bit integers, by all threads: PyTorch's own generator draws on one at a time.

    That generator gives a first number and a step. Each number that follows is mixed by itself:
    shifts bring its high bits down, products its low bits up. They are even at first: a shift
    copies the sign, and would make the same of a number and its complement, which is odd.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014), with the
    factors of MurmurHash3.
    """
    first, step = 2 * torch.empty(2, dtype=torch.int32).random_(-(2**31), None)
    words = torch.arange(n, dtype=torch.int32).mul_(step | 2).add_(first)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words ^= words >> shift
        words *= factor - 2**32  # as int32
    return words


class Dropout(nn.Dropout):
    """`nn.Dropout` (Srivastava et al., 2014) with masks that are cheap to draw on a CPU.

    PyTorch draws a Bernoulli number for each value, which on a CPU takes longer than all of this
    network's matrix products. Here each value gets 8 random bits and is dropped where they are
    among the lowest p of all, so p is rounded to 1/256; near 0 or 1 it gets 16 bits.
    `torch.manual_seed` fixes the masks.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.draws(x):
            return super().forward(x)
        keep, scale = self.mask(x)
        return (x * keep).mul_(scale)

    def draws(self, x: Tensor) -> bool:
        """Whether values of x are dropped, and by a mask that is drawn here."""
        return self.training and self.p > 0.0 and x.device.type == "cpu"

    def mask(self, x: Tensor) -> tuple[Tensor, float]:
        """Integers of x's shape, 0 where a value is dropped, else 1; and the scale 1 / (1 - p)."""
        bits, dtype = (8, torch.int8) if 1 / 32 < self.p < 31 / 32 else (16, torch.int16)
        words = random_words((x.numel() * bits + 31) // 32)
        values = words.view(dtype)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * 2**bits), 2**bits - 1)  # of 2^bits equally likely values
        return values.ge_(dropped - 2 ** (bits - 1)), 2**bits / (2**bits - dropped)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(D / H)) v in each head.

    Source: Vaswani et al., 2017, section 3.2.2; ViT, appendix A. Parameters are named and shaped
    as in `nn.MultiheadAttention`, so the checkpoints of one load in the other.

    Shape: (B, T, D) -> (B, T, D), or (B, queries, D), of the first tokens only.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # q, k and v stacked
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        # Xavier, as in nn.MultiheadAttention, on purpose: with the other matrices' std of 0.02 the
        # attention would begin all but uniform.
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D/H)
        q = q[:, :, :queries]  # (B, H, Q, D/H), Q = T where `queries` is None
        if x.is_cuda:
            p = self.dropout.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            # Over so few tokens the formula itself is the fastest on a CPU: the fused kernel's
            # backward is slow in bf16, and so is softmax.
            scores = q * (D // self.num_heads) ** -0.5 @ k.transpose(-2, -1)  # (B, H, Q, T)
            weights = self.dropout(scores.softmax(dim=-1, dtype=torch.float32))
            x = weights.to(v.dtype) @ v  # (B, H, Q, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """Linear, GELU, dropout, linear, dropout (ViT, section 3.1).

    Shape: (B, T, D) -> (B, T, D).
    """

    def forward(self, x: Tensor) -> Tensor:
        fc1, gelu, dropout, fc2, last_dropout = self
        if not dropout.draws(x):
            return super().forward(x)
        # The same in fewer passes over the hidden values, which are the most. 10,000 is taken from
        # what is dropped: there GELU and its derivative are 0. The weights are scaled, not the
        # values, which in bf16 would round the scale.
        hidden = fc1(x)  # (B, T, 4D)
        keep, scale = dropout.mask(hidden)
        hidden = torch.add(hidden, keep.sub_(1), alpha=1e4)
        return last_dropout(F.linear(gelu(hidden), fc2.weight * scale, fc2.bias))


class TransformerBlock(nn.Module):
    """A pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)) (ViT, eqs. 2 and 3).

    Shape: (B, T, D) -> (B, T, D), or (B, queries, D), of the first tokens only.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden_dim = round(dim * mlp_ratio)
        self.mlp = MLP(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            Dropout(dropout),
        )

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


def drop_patches(x: Tensor, share: float, first: int = 0) -> Tensor:
    """Leave a random share of each image's patches out, others for each image.

    A network that sees half of the patches in training takes little more than half of the time, and
    learns nearly as much from an image.

    Source: Liu et al., "PatchDropout: Economizing Vision Transformers Using Patch Dropout" (2023).

    Args:
        first: how many tokens stay in any case, at the start: 1 with CLS.

    Shape: (B, first + N, D) -> (B, first + K, D), K = N (1 - share), rounded, at least 1.
    """
    B, T, D = x.shape
    kept = max(1, round((T - first) * (1 - share)))
    order = torch.rand(B, T - first, device=x.device).argsort(dim=1)[:, :kept] + first  # (B, K)
    patches = x.gather(1, order.unsqueeze(-1).expand(-1, -1, D))
    return torch.cat((x[:, :first], patches), dim=1) if first else patches


def sincos2d(side: int, embed_dim: int) -> Tensor:
    """Fixed position embeddings: sines and cosines of a patch's column, then of its row.

    Source: Beyer et al., "Better plain ViT baselines for ImageNet-1k" (2022), section 2.

    Shape: (1, side^2, embed_dim), row by row.

    Raises:
        ValueError: 4 does not divide `embed_dim`.
    """
    if embed_dim % 4 != 0:
        raise ValueError(f"sincos2d needs an embed_dim divisible by 4, got {embed_dim}")
    frequencies = 10_000 ** -torch.linspace(0, 1, embed_dim // 4)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.stack((columns, rows), dim=-1).view(-1, 2, 1) * frequencies  # (N, 2, D/4)
    return torch.stack((angles.sin(), angles.cos()), dim=2).view(1, -1, embed_dim)


class ViT(nn.Module):
    """Vision Transformer: patches and a CLS token, encoder blocks, a linear head on the CLS token
    (ViT, eqs. 1 to 4).

    Args:
        pool: what the head reads: "cls", or "mean", the mean of the patches' tokens without any
            CLS token (Beyer et al., 2022).
        pos_embed: "learned", or "sincos2d", fixed.
        patch_drop: share of the patches that are left out in training.

    Shape: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Raises:
        ValueError: `patch_size` does not divide `img_size`, or `num_heads` `embed_dim`, or, with
            "sincos2d", 4 does not; or another word for `pool` or `pos_embed`.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = 7,
        in_chans: int = 1,
        num_classes: int = 10,
        embed_dim: int = 96,
        depth: int = 16,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        pool: str = "cls",
        pos_embed: str = "learned",
        patch_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in ("cls", "mean") or pos_embed not in ("learned", "sincos2d"):
            raise ValueError(
                f"pool {pool!r} and pos_embed {pos_embed!r} given, expected cls or mean and "
                "learned or sincos2d"
            )
        self.pool, self.patch_drop = pool, patch_drop
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_tokens = self.patch_embed.num_patches
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            num_tokens += 1
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        else:  # CLS has no place in the image: all 0
            fixed = torch.zeros(1, num_tokens, embed_dim)
            fixed[:, -self.patch_embed.num_patches :] = sincos2d(img_size // patch_size, embed_dim)
            self.register_buffer("pos_embed", fixed)
        self.pos_drop = Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

        if pool == "cls":
            nn.init.normal_(self.cls_token, std=0.02)
        if pos_embed == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """The tokens that the first block reads: (B, in_chans, img_size, img_size) -> (B, T, D)."""
        x = self.patch_embed(x)  # (B, N, D)
        if self.pool == "cls":
            cls = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
            x = torch.cat((cls, x), dim=1)
        x = x + self.pos_embed
        if self.training and self.patch_drop:
            x = drop_patches(x, self.patch_drop, first=int(self.pool == "cls"))
        return self.pos_drop(x)  # (B, T, D); T is smaller where patches were left out

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: (B, in_chans, img_size, img_size) -> (B, D)."""
        x = self.embed(x)  # (B, T, D)
        for block in self.blocks[:-1]:
            x = block(x)
        # Of the last block's tokens only CLS is read.
        return self.pooled(self.blocks[-1](x, queries=1 if self.pool == "cls" else None))

    def pooled(self, x: Tensor) -> Tensor:
        """What the head reads of the last block's tokens: (B, T, D) -> (B, D)."""
        return self.norm(x[:, 0]) if self.pool == "cls" else self.norm(x).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # (B, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    model = ViT()
    print(f"output shape: {tuple(model(torch.randn(2, 1, 28, 28)).shape)}")
    print(f"parameters: {count_parameters(model):,}")
