"""DiT in PyTorch with the parameter names of the published checkpoints, and its sampling in both modes.

Written from the paper (Peebles and Xie 2023) to compute what the authors' models.py, sample.py and
gaussian_diffusion.py compute. Letters: N sequences (twice the images with guidance), L tokens, D width, C latent
channels, p patch size.

Mode "eager" is the authors' loop operation for operation: both halves of guidance as a doubled batch, timestep and
class embedded and every block's modulation computed anew at every step, noise drawn for both halves. Mode "tuned" takes
out what does not depend on x (embeddings, modulations of all classes and of as many steps as fit, as one GEMM), embeds
the patches once for both halves, and uses packed linear layers.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import device
from eager import Eager, from_table, reverse_step
from model import Attention, Mlp, TimeEmbedder, load
from tuned import CUDA_MODULATION_BYTES, MODULATION_BYTES, Packed, TunedHead, attention

DEFAULTS = dict(input_size=32, patch_size=2, in_channels=4, mlp_ratio=4.0, num_classes=1000)
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
GUIDED = 3  # channels that the authors' guidance covers


def is_dit(config):
    """Whether a configuration, or a name such as dit-xl/2, is a DiT's."""
    return config.startswith("dit-") if isinstance(config, str) else "input_size" in (config or {})


def resolve_config(config):
    if isinstance(config, str):
        size, _, patch = config.removeprefix("dit-").partition("/")
        if size not in SIZES or patch not in ("2", "4", "8"):
            raise ValueError(f"unknown model {config!r}; known: dit-s, -b, -l, -xl with /2, /4, /8")
        width, depth, heads = SIZES[size]
        config = dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=int(patch))
    full = {**DEFAULTS, **config}
    missing = [k for k in ("hidden_size", "depth", "num_heads") if k not in full]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    return full


def position_embedding(width, side):
    """The fixed table [1, side², width]: sines and cosines of the column, then of the row (MAE's 2-D form, float64)."""
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = (v.reshape(-1, 1) * omega for v in np.mgrid[:side, :side].astype(np.float64))
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return torch.tensor(table, dtype=torch.float32).unsqueeze(0)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """AdaLN-zero: six modulations of SiLU(c) shift, scale and gate both halves of a transformer block."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Patches(nn.Module):
    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Labels(nn.Module):
    """Class embeddings; the last row stands for no class."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = resolve_config(config)
        width, self.patch, self.channels = c["hidden_size"], c["patch_size"], c["in_channels"]
        self.size, self.side = c["input_size"], c["input_size"] // c["patch_size"]
        self.x_embedder = Patches(self.channels, self.patch, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = Labels(c["num_classes"], width)
        self.pos_embed = nn.Parameter(position_embedding(width, self.side), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, c["num_heads"], c["mlp_ratio"]) for _ in range(c["depth"])])
        self.final_layer = FinalLayer(width, self.patch**2 * 2 * self.channels)

    def unpatchify(self, x):
        """[N, L, p²·2C], columns (row, column, channel) -> [N, 2C, h, w]."""
        s, p = self.side, self.patch
        return torch.einsum("nhwpqc->nchpwq", x.reshape(len(x), s, s, p, p, -1)).reshape(len(x), -1, s * p, s * p)

    def forward(self, x, t, y):
        """x [N, C, h, w], t [N], y [N] -> noise estimate and variance logits, [N, 2C, h, w]."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, scale, guided=GUIDED):
        """Rows [0, N/2) conditional, the rest without class, both from the first half of x."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half], dim=0), t, y)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        eps = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps], dim=0), rest], dim=1)


def load_dit(config, path):
    return load(DiT, config, path)


def ddim_step(diffusion, out, x, t):
    """One deterministic step (Song et al. 2021, η = 0) from the network's output at respaced step t [N]."""
    eps = out[:, : x.shape[1]]
    shape = [len(x), x[0].numel()]

    def table(values):
        return from_table(values, t, shape).view(x.shape)

    recip, recipm1 = table(diffusion.sqrt_recip_alphas_cumprod), table(diffusion.sqrt_recipm1_alphas_cumprod)
    x0 = recip * x - recipm1 * eps
    eps = (recip * x - x0) / recipm1
    prev = table(diffusion.alphas_cumprod_prev)
    return x0 * torch.sqrt(prev) + torch.sqrt(1 - prev) * eps


class EagerDiT(Eager):
    """The authors' sampling."""

    def sample(self, request, draws, clock):
        """Latents [n, C, h, w]. Steps outside request.subset are not run and leave x as it is."""
        dit, n, guided, diffusion = self.model, request.batch, request.cfg != 1.0, request.diffusion
        null = dit.config["num_classes"]
        y = torch.tensor([null] * n if request.labels is None else request.labels)
        x = draws.initial(0, n, dit.channels, dit.size, dit.size)
        if guided:
            x, y = torch.cat([x, x], dim=0), torch.cat([y, torch.full((n,), null)], dim=0)

        def model(x, timesteps):
            if guided:
                return dit.forward_with_cfg(x, timesteps, y, request.cfg, GUIDED if request.cfg_channels == "3" else dit.channels)
            return dit(x, timesteps, y)

        for i in range(diffusion.steps):
            if i not in request.subset:
                continue
            started = device.now()
            t = torch.tensor([diffusion.steps - 1 - i] * len(x))
            noise = draws.step(0, i, *x.shape)
            if request.sampler == "ddim":
                x = ddim_step(diffusion, model(x, torch.tensor(diffusion.timestep_map)[t]).float(), x, t)
            else:
                # The reverse step of the head works on rows of numbers: an image is a row whose channels are its latents.
                flat = lambda v: v.reshape(len(v), v.shape[1] // dit.channels, -1).flatten(1)
                x = reverse_step(diffusion, lambda v, ts: flat(model(v.view(x.shape), ts).float()), flat(x), t, flat(noise),
                                 1.0).view(x.shape)
            taken = device.now() - started
            clock.iteration(i, denoiser=taken, total=taken, rows=len(x) * dit.side**2)
        return x[:n]


class TunedBlock:
    """A block with modulations given, [N, 6, 1, D] with 1 + scale where scale was."""

    def __init__(self, block, dtype):
        self.heads, self.width = block.attn.heads, block.attn.proj.in_features
        self.qkv = Packed(block.attn.qkv.weight, block.attn.qkv.bias, dtype)
        self.proj = Packed(block.attn.proj.weight, block.attn.proj.bias, dtype)
        self.fc1 = Packed(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype)
        self.fc2 = Packed(block.mlp.fc2.weight, block.mlp.fc2.bias, dtype)

    def __call__(self, x, m):
        n, length, width = x.shape
        h = torch.addcmul(m[:, 0], F.layer_norm(x, (width,), eps=1e-6), m[:, 1])
        q, k, v = self.qkv(h).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = torch.addcmul(x, m[:, 2], self.proj(a))
        h = torch.addcmul(m[:, 3], F.layer_norm(x, (width,), eps=1e-6), m[:, 4])
        return torch.addcmul(x, m[:, 5], self.fc2(self.fc1(h, "gelu_tanh")))


class Tuned:
    """The fastest sampling that we know how to write; takes the blocks of the DiT away to free them."""

    def __init__(self, dit, dtype):
        dit.requires_grad_(False)
        self.dtype, self.config, self.channels, self.patch = dtype, dit.config, dit.channels, dit.patch
        self.size, self.side, self.unpatchify = dit.size, dit.side, dit.unpatchify
        self.x_embedder, self.pos, self.labels, self.time = dit.x_embedder, dit.pos_embed, dit.y_embedder, dit.t_embedder
        self.width, self.depth = dit.config["hidden_size"], len(dit.blocks)
        ada = [b.adaLN_modulation[1] for b in dit.blocks] + [dit.final_layer.adaLN_modulation[1]]
        bias = torch.cat([a.bias.detach() for a in ada]).clone().view(-1, self.width)
        for i in range(self.depth):
            bias[6 * i + 1] += 1  # the 1 of "1 + scale"
            bias[6 * i + 4] += 1
        bias[6 * self.depth + 1] += 1
        self.ada = Packed(torch.cat([a.weight.detach() for a in ada]), bias.flatten(), dtype)
        self.blocks = [TunedBlock(b, dtype) for b in dit.blocks]
        self.final = Packed(dit.final_layer.linear.weight, dit.final_layer.linear.bias, dtype)
        del dit.blocks

    def context(self):
        return torch.inference_mode()

    def prepare(self, request):
        pass

    def denoise(self, x, copies, m):
        """x [n, C, h, w] float32, m [N, 6·depth+2, 1, D] -> [N, 2C, h, w] float32, N = copies·n."""
        h = (self.x_embedder(x) + self.pos).to(self.dtype).repeat(copies, 1, 1)
        for i, block in enumerate(self.blocks):
            h = block(h, m[:, 6 * i : 6 * i + 6])
        k = 6 * self.depth
        h = torch.addcmul(m[:, k], F.layer_norm(h, (self.width,), eps=1e-6), m[:, k + 1])
        return self.unpatchify(self.final(h)).float()

    def sample(self, request, draws, clock):
        n, guided, diffusion, c = request.batch, request.cfg != 1.0, request.diffusion, self.channels
        null = self.config["num_classes"]
        y = [null] * n if request.labels is None else list(request.labels)
        y += [null] * n if guided else []
        classes = sorted(set(y))
        of = torch.tensor([classes.index(k) for k in y])
        embedded = self.time(torch.tensor(diffusion.timestep_map[::-1]))[:, None] + self.labels(torch.tensor(classes))
        limit = GUIDED if request.cfg_channels == "3" else c
        x = draws.initial(0, n, c, self.size, self.size)
        per_step = len(classes) * (6 * self.depth + 2) * self.width * (2 if self.dtype == torch.bfloat16 else 4)
        chunk = max(1, (8 * MODULATION_BYTES if device.kind() == "cpu" else CUDA_MODULATION_BYTES) // per_step)
        wanted = sorted(request.subset)
        for first in range(0, len(wanted), chunk):
            part = wanted[first : first + chunk]
            started = device.now()
            mods = self.ada(F.silu(embedded[part]).to(self.dtype).view(-1, self.width))
            mods = mods.view(len(part), len(classes), -1, 1, self.width)
            shared = (device.now() - started) / len(part)
            for k, i in enumerate(part):
                started = device.now()
                t = diffusion.steps - 1 - i
                out = self.denoise(x, 2 if guided else 1, mods[k][of])
                eps, v = out[:n, :c], out[:n, c:]
                if guided:
                    eps = torch.cat([torch.lerp(out[n:, :limit], eps[:, :limit], request.cfg), eps[:, limit:]], dim=1)
                if request.sampler == "ddim":
                    x = self.ddim_step(diffusion, t, x, eps)
                else:
                    x = TunedHead.reverse_step(diffusion, t, x, eps, v, draws.step(0, i, *x.shape), 1.0)
                taken = device.now() - started + shared
                clock.iteration(i, denoiser=taken, total=taken, rows=len(y) * self.side**2)
        return x

    @staticmethod
    def ddim_step(diffusion, t, x, eps):
        prev = diffusion.alphas_cumprod_prev[t]
        of_x = math.sqrt(prev) * diffusion.sqrt_recip_alphas_cumprod[t]
        of_eps = math.sqrt(1 - prev) - math.sqrt(prev) * diffusion.sqrt_recipm1_alphas_cumprod[t]
        return torch.add(x * of_x, eps, alpha=of_eps)


SAMPLERS = {"eager": EagerDiT, "tuned": Tuned}
