"""Small causal networks in the manners of different authors, for tests of `incremental`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.autoregressive.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig


class MaskedConv2d(nn.Conv2d):
    """Masks its own parameter, in place, whenever it runs."""

    def __init__(self, mask_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        h, w = self.weight.shape[2:]
        self.register_buffer("mask", torch.zeros_like(self.weight.data))
        self.mask[:, :, : h // 2, :] = 1
        self.mask[:, :, h // 2, : w // 2 + (mask_type == "B")] = 1

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class MaskedResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.ReLU(inplace=True),
            MaskedConv2d("B", channels // 2, channels // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class PlainPixelCNN(nn.Module):
    """7 x 7 of mask A, residual blocks of mask B; a Bernoulli for each pixel."""

    def __init__(self, channels: int = 12, kernel_size: int = 7) -> None:
        super().__init__()
        self.input = MaskedConv2d("A", 1, channels, kernel_size, padding=kernel_size // 2)
        self.layers = nn.ModuleList(MaskedResidual(channels) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def two_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits 0 and b of a network that gives the Bernoulli logit b of every pixel."""

    def forward(x: Tensor) -> Tensor:
        out = model(x)
        return torch.cat([torch.zeros_like(out), out], 1)

    return forward


class ChannelNorm(nn.LayerNorm):
    """Over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MixedStack(nn.Module):
    """Batch norm; norms over channels and weight norm in two manners; groups, dilation, many activations."""

    def __init__(self, colours: int = 1, levels: int = 4, width: int = 8) -> None:
        super().__init__()
        self.input = MaskedConv2d("A", colours, width, 5, padding=2)
        self.batch_norm = nn.BatchNorm2d(width)
        self.batch_norm.running_mean.normal_()
        self.batch_norm.running_var.uniform_(0.5, 2)
        self.norm = ChannelNorm(width)
        self.grouped = MaskedConv2d("B", width, width, 3, padding=2, dilation=2, groups=4)
        self.old = nn.utils.weight_norm(nn.Conv2d(width, width, 1))
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv2d(2 * width, width, 1))
        self.linear = nn.Linear(width, width)
        self.head = nn.Conv2d(width, colours * levels, 1)
        self.slope = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.batch_norm(self.input(x))
        h = F.gelu(h) + F.silu(h) * 0.5 - F.leaky_relu(h, 0.2) / 3
        h = h + F.softplus(self.grouped(self.norm(h)))
        h = h * self.slope
        h = h + down(h.tanh()) * right(h.abs())
        centred = h - h.mean(1, keepdim=True)
        h = centred * (h.var(1, keepdim=True, unbiased=False) + 1e-4).rsqrt()
        h = F.selu(self.old(h)).clamp(-2, 2)
        h = self.new(torch.cat([F.elu(h), torch.maximum(h, -h)], 1)) - h.neg().exp().clamp(max=3)
        h = h + self.linear(h.permute(0, 2, 3, 1).tanh()).permute(0, 3, 1, 2)
        h = F.dropout(F.hardtanh(h) + F.mish(h) + h.square().add(1).sqrt(), 0.5, self.training)
        return self.head(F.glu(torch.cat([h, h], 1), 1))


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


def weight_norm(module: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module)


def down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def right(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], 3)


class ShiftedConv(nn.Module):
    """Looks down (kernel 2 x 3) or down and right (2 x 2), with a stride."""

    def __init__(self, i: int, o: int, *, both: bool, stride: int = 1, kernel: tuple[int, int] | None = None) -> None:
        super().__init__()
        kh, kw = kernel or ((2, 2) if both else (2, 3))
        self.pad = (kw - 1, 0, kh - 1, 0) if both else ((kw - 1) // 2, (kw - 1) // 2, kh - 1, 0)
        self.conv = weight_norm(nn.Conv2d(i, o, (kh, kw), stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class ShiftedTranspose(nn.Module):
    def __init__(self, i: int, o: int, *, both: bool) -> None:
        super().__init__()
        self.both = both
        self.conv = nn.ConvTranspose2d(i, o, (2, 2) if both else (2, 3), 2, output_padding=(0, 0) if both else (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = self.conv(x)
        return y[:, :, : 2 * h, : 2 * w] if self.both else y[:, :, : 2 * h, 1 : 2 * w + 1]


class GatedResidual(nn.Module):
    def __init__(self, c: int, *, both: bool, skip: int = 0) -> None:
        super().__init__()
        self.input = ShiftedConv(2 * c, c, both=both)
        self.skip = nn.Linear(2 * skip, c) if skip else None
        self.output = ShiftedConv(2 * c, 2 * c, both=both)

    def forward(self, x: Tensor, a: Tensor | None = None) -> Tensor:
        h = self.input(concat_elu(x))
        if self.skip is not None:
            # A matrix at each pixel, on a batch of pixels.
            flat = concat_elu(a).permute(0, 2, 3, 1).contiguous()
            n, rows, columns, c = flat.shape
            h = h + self.skip(flat.view(n * rows * columns, c)).view(n, rows, columns, -1).permute(0, 3, 1, 2)
        h = F.dropout(concat_elu(h), 0.5, self.training)
        value, gate = self.output(h).chunk(2, 1)
        return x + value * torch.sigmoid(gate)


class SmallPixelCNNPP(nn.Module):
    """Two scales; a mixture of logistics, or logits, for each pixel."""

    def __init__(self, colours: int = 3, c: int = 8, outputs: int = 20) -> None:
        super().__init__()
        self.u_init = ShiftedConv(colours + 1, c, both=False)
        self.ul_init = nn.ModuleList([
            ShiftedConv(colours + 1, c, both=False, kernel=(1, 3)),
            ShiftedConv(colours + 1, c, both=True, kernel=(2, 1)),
        ])  # fmt: skip
        self.u = nn.ModuleList(GatedResidual(c, both=False) for _ in range(2))
        self.ul = nn.ModuleList(GatedResidual(c, both=True, skip=c) for _ in range(2))
        self.u_down, self.ul_down = ShiftedConv(c, c, both=False, stride=2), ShiftedConv(c, c, both=True, stride=2)
        self.u_back = nn.ModuleList(GatedResidual(c, both=False, skip=c) for _ in range(3))
        self.ul_back = nn.ModuleList(GatedResidual(c, both=True, skip=2 * c) for _ in range(3))
        self.u_up, self.ul_up = ShiftedTranspose(c, c, both=False), ShiftedTranspose(c, c, both=True)
        self.output = nn.Conv2d(c, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        u = [down(self.u_init(x))]
        ul = [down(self.ul_init[0](x)) + right(self.ul_init[1](x))]
        u.append(self.u[0](u[-1]))
        ul.append(self.ul[0](ul[-1], u[-1]))
        u.append(self.u_down(u[-1]))
        ul.append(self.ul_down(ul[-1]))
        u.append(self.u[1](u[-1]))
        ul.append(self.ul[1](ul[-1], u[-1]))
        a, b = u.pop(), ul.pop()
        for i in range(3):
            a = self.u_back[i](a, u.pop())
            b = self.ul_back[i](b, torch.cat([a, ul.pop()], 1))
            if i == 0:
                a, b = self.u_up(a), self.ul_up(b)
        return self.output(F.elu(b))


class CausalAttention(nn.Module):
    """Scores written out; a pixel looks at those before it, the first at none."""

    def __init__(self, channels: int, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width)
        self.key = nn.Linear(channels + 1, width)
        self.value = nn.Linear(channels + 1, width)
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        n, _, h, w = key.shape

        def split(x: Tensor) -> Tensor:
            return x.view(n, h * w, self.heads, -1).transpose(1, 2)

        q = split(self.query(query.view(n, -1, h * w).transpose(1, 2)))
        flat = key.view(n, -1, h * w).transpose(1, 2)
        k, v = split(self.key(flat)), split(self.value(flat))
        mask = torch.ones(h * w, h * w).tril(-1)[None, None]
        scores = torch.matmul(q, k.transpose(2, 3)) / k.shape[-1] ** 0.5
        scores = scores.masked_fill(mask == 0, -1e4)
        weights = F.softmax(scores, 3) * mask
        start = torch.ones(h * w, 1)
        start[0] = 0
        return (torch.matmul(weights * start, v)).transpose(1, 2).reshape(n, h, w, -1).permute(0, 3, 1, 2)


class SmallPixelSNAIL(nn.Module):
    def __init__(self, colours: int = 1, levels: int = 4, c: int = 8) -> None:
        super().__init__()
        self.vertical = nn.Conv2d(colours, c, (2, 5))
        self.horizontal = nn.Conv2d(colours, c, (3, 2))
        self.blocks = nn.ModuleList(GatedResidual(c, both=True) for _ in range(2))
        self.attention = CausalAttention(c + 2)
        self.merge = nn.Conv2d(c, c, 1)
        self.native = nn.Conv2d(c, 3 * c, 1)
        self.head = nn.Conv2d(c, colours * levels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"))
        place = place[None].expand(n, 2, h, w)
        out = down(self.vertical(F.pad(x, (2, 2, 1, 0)))) + right(self.horizontal(F.pad(x, (1, 0, 2, 0))))
        for block in self.blocks:
            out = block(out)
            key = torch.cat([x, out, place], 1)
            query = torch.cat([out, place], 1)
            out = out + self.merge(self.attention(query, key))
        q, k, v = self.native(out).flatten(2).unflatten(1, (3, 2, -1)).transpose(3, 4).unbind(1)
        out = out + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(2, 3).flatten(1, 2).view(
            out.shape
        )
        return self.head(F.elu(out))


class SmallWaveNet(nn.Module):
    """Dilated gated convolutions in time; the sample as numbers, or as codes in one of two manners."""

    def __init__(self, levels: int = 6, c: int = 8, inputs: str = "numbers", conditions: int | None = None) -> None:
        super().__init__()
        self.inputs, self.levels = inputs, levels
        self.embedding = nn.Embedding(levels, c)
        self.first = nn.Conv1d({"numbers": 1, "one-hot": levels, "embedding": c}[inputs], c, 2)
        self.dilated = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=2**i) for _ in range(2) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in self.dilated)
        self.skip = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in self.dilated)
        self.label = nn.Embedding(conditions, 2 * c) if conditions else None
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(c, c, 1), nn.ReLU(), nn.Conv1d(c, levels, 1))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        if self.inputs == "one-hot":
            x = F.one_hot(x, self.levels).transpose(1, 2).float()
        elif self.inputs == "embedding":
            x = self.embedding(x).transpose(1, 2)
        h = self.first(F.pad(x, (2, -1)))
        skips: Any = 0
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            wide = dilated(F.pad(h, (dilated.dilation[0], 0)))
            if self.label is not None:
                wide = wide + self.label(label)[:, :, None]
            value, gate = wide.chunk(2, 1)
            z = torch.tanh(value) * torch.sigmoid(gate)
            skips = skips + skip(z)
            h = h + residual(z)
        return self.head(skips)


class ClassPlanes(nn.Module):
    """A condition that is painted over the whole picture, upsampled."""

    def __init__(self, levels: int = 3, c: int = 8) -> None:
        super().__init__()
        self.planes = nn.Linear(5, 4)
        self.paint = nn.Conv2d(1, c, 3, padding=1)
        self.input = MaskedConv2d("A", 1, c, 3, padding=1)
        self.blocks = nn.Sequential(MaskedResidual(2 * c))
        self.head = nn.Conv2d(2 * c, levels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        n, _, h, w = x.shape
        planes = self.planes(condition).view(n, 1, 2, 2)
        painted = self.paint(F.interpolate(planes, (h, w), mode="nearest"))
        return self.head(self.blocks(torch.cat([self.input(x), painted], 1)))


class Upsampled(nn.Module):
    """Rows above at half the size, upsampled by repetition."""

    def __init__(self, levels: int = 3, c: int = 8) -> None:
        super().__init__()
        self.rows = nn.Conv2d(1, c, (2, 4), (2, 2))
        self.pixel = MaskedConv2d("A", 1, c, 3, padding=1)
        self.head = nn.Conv2d(c, levels, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = (
            self.rows(F.pad(x, (1, 1, 2, 0)))[:, :, :-1] if x.shape[2] % 2 == 0 else self.rows(F.pad(x, (1, 1, 1, 0)))
        )
        above = F.interpolate(half, scale_factor=2, mode="nearest")
        return self.head(F.relu(self.pixel(x) + above[:, :, : x.shape[2], : x.shape[3]]))


class SequenceTransformer(nn.Module):
    """Tokens of a flattened picture behind a token of their own, PyTorch's encoder with a causal mask."""

    def __init__(self, levels: int = 4, length: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(levels, width)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 24, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, levels)

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.permute(0, 2, 3, 1).flatten(1)
        n, length = flat.shape
        h = torch.cat([self.start.expand(n, 1, -1), self.embedding(flat)[:, :-1]], 1) + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.encoder(h, mask, is_causal=True))


@dataclasses.dataclass
class Case:
    """A network, and how it is converted: `incremental(model, shape, levels=levels, **options)`."""

    model: nn.Module
    shape: tuple[int, ...]
    levels: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def call(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The network's outputs."""
        forward = self.options.get("forward") or self.model
        return forward(x) if condition is None else forward(x, condition)


def gated(classes: int | None, colours: int) -> Case:
    config = GatedPixelCNNConfig(
        shape=(colours, 5, 6), layers=2, width=6 * colours, head=4 * colours, levels=5, classes=classes
    )
    model = GatedPixelCNN(config)
    options: dict[str, Any] = {
        "forward": lambda x, *condition: model.logits(x, condition=condition[0] if condition else None)
    }
    if classes is not None:
        options["condition"] = torch.tensor([1])
    return Case(model, (colours, 5, 6), 5, options)


def bernoulli() -> Case:
    model = PlainPixelCNN()
    return Case(model, (1, 6, 7), 2, {"forward": two_logits(model), "values": torch.tensor([0.0, 1.0])})


CASES: dict[str, Callable[[], Case]] = {
    "plain": bernoulli,
    "gated": lambda: gated(None, 1),
    "gated, classes": lambda: gated(3, 1),
    "gated, colours": lambda: gated(3, 3),
    "narrow": lambda: Case(PlainPixelCNN(kernel_size=3), (1, 5, 2), 1),
    "mixed": lambda: Case(MixedStack(), (1, 5, 6), 4),
    "plus plus": lambda: Case(SmallPixelCNNPP(), (3, 6, 8), 16, {"logistics": True}),
    "plus plus, grey": lambda: Case(SmallPixelCNNPP(1, outputs=9), (1, 8, 4), 16, {"logistics": True}),
    "plus plus, logits": lambda: Case(SmallPixelCNNPP(1, outputs=5), (1, 6, 6), 5),
    "snail": lambda: Case(SmallPixelSNAIL(), (1, 5, 4), 4),
    "wave": lambda: Case(SmallWaveNet(), (1, 40), 6),
    "wave, one-hot": lambda: Case(SmallWaveNet(inputs="one-hot"), (33,), 6, {"values": torch.arange(6)}),
    "wave, embedding": lambda: Case(
        SmallWaveNet(inputs="embedding", conditions=4), (33,), 6,
        {"values": torch.arange(6), "condition": torch.tensor([2])},
    ),
    "class planes": lambda: Case(ClassPlanes(), (1, 6, 5), 3, {"condition": torch.randn(1, 5)}),
    "upsampled": lambda: Case(Upsampled(), (1, 6, 6), 3),
    "transformer": lambda: Case(SequenceTransformer(), (1, 3, 4), 4, {"values": torch.arange(4)}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """A case with parameters that make its outputs differ from place to place."""
    torch.manual_seed(len(name))
    case = CASES[name]()
    for parameter in case.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    case.model.to(dtype).eval()
    if dtype == torch.float64 and "condition" in case.options and case.options["condition"].is_floating_point():
        case.options["condition"] = case.options["condition"].double()
    return case
