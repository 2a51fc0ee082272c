"""Decoder of the KL tokenizer (LDM's autoencoder, KL-16 in MAR), with the parameter names of the checkpoints.

Computes what the authors' models/vae.py computes in AutoencoderKL.decode. The tuned form keeps the function and uses
channels_last, fused in-place SiLU, SDPA, and bf16 weights in place of autocast.
"""

import json

import torch
import torch.nn.functional as F
from torch import nn

import device
from model import load_into, randomize, read_weights

KL16 = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, z_channels=16, resolution=256, decoder_attn_resolutions=[])


def swish_plain(x):
    return x * torch.sigmoid(x)


def swish_fused(x):
    return F.silu(x, inplace=True)


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, swish):
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, swish):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        if swish is swish_fused:  # the tuned form
            h = F.scaled_dot_product_attention(*(t.transpose(1, 2).unsqueeze(1) for t in (q, k, v)))
            h = h.squeeze(1).transpose(1, 2)
        else:
            w = torch.bmm(q.permute(0, 2, 1), k) * (x.shape[1] ** -0.5)
            h = torch.bmm(v, F.softmax(w, dim=2).permute(0, 2, 1))
        return x + self.proj_out(h.reshape(x.shape))


class Level(nn.Module):
    """One resolution of the decoder: residual blocks, attention where asked for, and the doubling that follows."""

    def __init__(self, inputs, outputs, blocks, attention, doubles):
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(outputs) for _ in range(blocks if attention else 0)])
        if doubles:
            self.upsample = nn.ModuleDict({"conv": conv3(outputs, outputs)})

    def forward(self, h, swish):
        for i, block in enumerate(self.block):
            h = block(h, swish)
            if len(self.attn):
                h = self.attn[i](h, swish)
        if hasattr(self, "upsample"):
            h = self.upsample["conv"](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        mult, width = c["ch_mult"], c["ch"] * c["ch_mult"][-1]
        self.conv_in = conv3(c["z_channels"], width)
        self.mid = nn.ModuleDict({"block_1": ResnetBlock(width, width), "attn_1": AttnBlock(width),
                                  "block_2": ResnetBlock(width, width)})
        levels, resolution = [], c["resolution"] // 2 ** (len(mult) - 1)
        for i in reversed(range(len(mult))):
            outputs = c["ch"] * mult[i]
            levels.insert(0, Level(width, outputs, c["num_res_blocks"] + 1,
                                   resolution in c["decoder_attn_resolutions"], i > 0))
            width, resolution = outputs, resolution * 2
        self.up = nn.ModuleList(levels)  # index 0 is the last level, as in the checkpoints
        self.norm_out, self.conv_out = group_norm(width), conv3(width, 3)

    def forward(self, z, swish):
        h = self.conv_in(z)
        for name in ("block_1", "attn_1", "block_2"):
            h = self.mid[name](h, swish)
        for level in reversed(self.up):
            h = level(h, swish)
        return self.conv_out(swish(self.norm_out(h)))


class KLDecoder(nn.Module):
    """Latents [N, c, h, w] -> pixels [N, 3, h*f, w*f] in about -1..1. The swish given picks the plain or tuned form."""

    def __init__(self, config):
        super().__init__()
        self.config = {**KL16, **config}
        z = self.config.get("embed_dim", self.config["z_channels"])
        self.post_quant_conv = nn.Conv2d(z, self.config["z_channels"], 1)
        self.decoder = Decoder(self.config)

    def forward(self, z, swish):
        return self.decoder(self.post_quant_conv(z), swish)


class Tokenizer:
    """Runs a KLDecoder in a mode and dtype. scale is the factor that latents were multiplied by before MAR saw them."""

    def __init__(self, decoder, mode, dtype, scale):
        self.mode, self.dtype, self.scale = mode, dtype, scale
        self.decoder = decoder
        if mode == "tuned":
            self.decoder = decoder.requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)

    def decode(self, latents):
        """MAR's latents -> pixels, float32."""
        z = latents / self.scale
        if self.mode == "tuned":
            with torch.inference_mode():
                return self.decoder(z.to(self.dtype, memory_format=torch.channels_last), swish_fused).float()
        with torch.no_grad(), torch.autocast(device.kind(), torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.decoder(z, swish_plain).float()


def load_tokenizer(config, path, mode, dtype, scale=None):
    """The tokenizer of a file, or one with random weights if path is None; config fills or overrides the file's own."""
    metadata = {}
    if path is None:
        decoder = KLDecoder(config or {})
        randomize(decoder)
    else:
        tensors, metadata = read_weights(path)
        decoder = KLDecoder({**json.loads(metadata.get("config", "{}")), **(config or {})})
        load_into(decoder, tensors, path, ignore=("encoder.", "quant_conv.", "loss."))
    scale = scale or float(metadata.get("latent_scale", 0.2325))
    return Tokenizer(decoder.eval(), mode, dtype, scale)
