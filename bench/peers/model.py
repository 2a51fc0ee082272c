"""MAR in PyTorch with the parameter names of the published checkpoints: the modules, their configuration and loading.

Written from the paper (MAR, section 3 and appendix B; DiT for AdaLN) to compute, operation for operation, what the
authors' models/mar.py and models/diffloss.py compute in eval mode. Letters: N images, L tokens, D trunk width,
W head width, R rows of the head, C numbers per token.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import device

DEFAULTS = dict(img_size=256, vae_stride=16, patch_size=1, vae_embed_dim=16, mlp_ratio=4.0, class_num=1000,
                buffer_size=64, diffloss_d=3, diffloss_w=1024, layernorm_eps=1e-6)


def trunk(width, depth, heads, **more):
    return dict(encoder_embed_dim=width, encoder_depth=depth, encoder_num_heads=heads,
                decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads, **more)


# The published models (the authors' README: diffloss_d and diffloss_w of the released checkpoints).
PUBLISHED = {
    "mar-base": trunk(768, 12, 12, diffloss_d=6, diffloss_w=1024),
    "mar-large": trunk(1024, 16, 16, diffloss_d=8, diffloss_w=1280),
    "mar-huge": trunk(1280, 20, 16, diffloss_d=12, diffloss_w=1536),
}


def resolve_config(config):
    """A full configuration from the name of a published model or a dict of the authors' argument names."""
    if isinstance(config, str):
        if config not in PUBLISHED:
            raise ValueError(f"unknown model {config!r}; known: {', '.join(PUBLISHED)}")
        config = PUBLISHED[config]
    full = {**DEFAULTS, **config}
    missing = [k for k in trunk(0, 0, 0) if k not in full]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    return full


class Attention(nn.Module):
    """Multi-head self-attention as in timm's ViT: one linear layer for q, k and v, laid out [3, heads, head width]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, length, width))


class Mlp(nn.Module):
    """approximate is that of torch's gelu: "none" (erf) or "tanh"."""

    def __init__(self, width, hidden, approximate="none"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(LN(x)), then x + MLP(LN(x)) with the exact (erf) GELU."""

    def __init__(self, width, heads, mlp_ratio, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of the timestep (256 numbers, cosines first) and a two-layer MLP, for every row."""

    SIZE = 256

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SIZE, width), nn.SiLU(), nn.Linear(width, width))

    @classmethod
    def sinusoid(cls, t):
        half = cls.SIZE // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * freqs[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, t):
        return self.mlp(self.sinusoid(t))


class ResBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), the three modulations a linear function of SiLU(y)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Head(nn.Module):
    """The denoising MLP: x [R, C], t [R], condition c [R, D] -> [R, 2C], the noise estimate and the variance logits."""

    def __init__(self, channels, width, depth, condition):
        super().__init__()
        self.channels = channels
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList([ResBlock(width) for _ in range(depth)])
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x, t, c):
        x = self.input_proj(x)
        t = self.time_embed(t)
        c = self.cond_embed(c)
        y = t + c
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def forward_with_cfg(self, x, t, c, scale):
        """Guidance: rows [0, R/2) conditional, the rest unconditional, both from the first half of x."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half], dim=0), t, c)
        eps, rest = out[:, : self.channels], out[:, self.channels :]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        eps = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps], dim=0), rest], dim=1)


class DiffLoss(nn.Module):
    """Only gives the head the name that checkpoints have for it."""

    def __init__(self, net):
        super().__init__()
        self.net = net


class MAR(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = resolve_config(config)
        d_enc, d_dec = c["encoder_embed_dim"], c["decoder_embed_dim"]
        self.side = c["img_size"] // c["vae_stride"] // c["patch_size"]
        self.seq_len = self.side**2
        self.buffer = c["buffer_size"]
        self.channels = c["vae_embed_dim"] * c["patch_size"] ** 2
        total, eps = self.seq_len + self.buffer, c["layernorm_eps"]

        def blocks(part):
            return nn.ModuleList([Block(c[f"{part}_embed_dim"], c[f"{part}_num_heads"], c["mlp_ratio"], eps)
                                  for _ in range(c[f"{part}_depth"])])

        self.class_emb = nn.Embedding(c["class_num"], d_enc)
        self.fake_latent = nn.Parameter(torch.zeros(1, d_enc))
        self.z_proj = nn.Linear(self.channels, d_enc)
        self.z_proj_ln = nn.LayerNorm(d_enc, 1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, d_enc))
        self.encoder_blocks = blocks("encoder")
        self.encoder_norm = nn.LayerNorm(d_enc, eps)
        self.decoder_embed = nn.Linear(d_enc, d_dec)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d_dec))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, d_dec))
        self.decoder_blocks = blocks("decoder")
        self.decoder_norm = nn.LayerNorm(d_dec, eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, d_dec))
        self.diffloss = DiffLoss(Head(self.channels, c["diffloss_w"], c["diffloss_d"], d_dec))

    def encode(self, tokens, mask, class_embedding):
        """tokens [N, L, C], mask [N, L] (1 hidden), class_embedding [N, D] -> buffer and visible tokens [N, buffer+vis, D]."""
        x = self.z_proj(tokens)
        n, _, width = x.shape
        x = torch.cat([torch.zeros(n, self.buffer, width), x], dim=1)
        mask = torch.cat([torch.zeros(n, self.buffer), mask], dim=1)
        x[:, : self.buffer] = class_embedding.unsqueeze(1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[(1 - mask).nonzero(as_tuple=True)].reshape(n, -1, width)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, mask):
        """Encoder output and mask -> condition of every token, [N, L, D]."""
        x = self.decoder_embed(x)
        mask = torch.cat([torch.zeros(len(x), self.buffer), mask], dim=1)
        full = self.mask_token.repeat(*mask.shape, 1).to(x.dtype).clone()
        full[(1 - mask).nonzero(as_tuple=True)] = x.reshape(-1, x.shape[2])
        x = full + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned

    def unpatchify(self, tokens):
        """Tokens [N, L, C] -> latents [N, c, h, w]."""
        p, c = self.config["patch_size"], self.config["vae_embed_dim"]
        x = tokens.reshape(len(tokens), self.side, self.side, c, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), c, self.side * p, self.side * p)


def randomize(module, seed=0):
    """Random weights for timing. Unlike the authors' initialisation nothing is zero: zero operands may run cooler."""
    generator = device.generator(seed)
    norms = {id(p) for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if id(p) not in norms and p.requires_grad:  # the others are tables that the authors compute
                p.normal_(0, 0.02 if p.dim() < 4 else (2 / p[0].numel()) ** 0.5, generator=generator)


def read_weights(path):
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}


def read_metadata(path):
    """The configuration that a safetensors file's metadata carries."""
    with safe_open(path, framework="pt") as f:
        return json.loads((f.metadata() or {}).get("config", "{}"))


def load_into(module, tensors, path, ignore=()):
    """Strict loading; ignore lists prefixes of tensors that the module does not use."""
    tensors = {k: v for k, v in tensors.items() if not k.startswith(tuple(ignore) or "\0")}
    result = module.load_state_dict(tensors, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(f"{path}: missing {result.missing_keys[:5]}, unexpected {result.unexpected_keys[:5]}")


def load(build, config, path):
    """build(config) with the weights of a safetensors file, whose own config serves if none is given; random ones if path is None."""
    if path is None:
        model = build(config)
        randomize(model)
    else:
        tensors, metadata = read_weights(path)
        model = build(config or json.loads(metadata.get("config", "{}")))
        load_into(model, tensors, path)
    return model.eval()


def load_mar(config, path):
    return load(MAR, config, path)
