"""The causal models of MAR's Table 1 (raster and random order AR) in PyTorch, with a KV cache, in both modes.

The paper's controls have no published code or weights. The trunk is defined in docs/checkpoints.md: one causal stack; a
row's input is the embedding of its own token and position plus that of the position that comes next. The buffer rows go
through at once, then one row for each token, whose keys and values are kept. What is generated is a token's vector by
the diffusion head, as in MAR. "eager" is the plain form: guidance as a doubled batch, the authors' head loop. "tuned"
has packed linear layers and the hoisted head of tuned.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

import device
from eager import EagerSampler
from model import MAR, Block, DiffLoss, Head, load, resolve_config
from schedule import cfg_scale
from tuned import Norm, Packed, TunedBlock, TunedHead, attention


class CausalMAR(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = resolve_config(config)
        if c.get("head", "diffusion") != "diffusion":
            raise ValueError(f"head {c['head']!r}; the peer has the diffusion head only")
        width, eps = c["decoder_embed_dim"], c["layernorm_eps"]
        self.side = c["img_size"] // c["vae_stride"] // c["patch_size"]
        self.seq_len, self.buffer = self.side**2, c["buffer_size"]
        self.channels = c["vae_embed_dim"] * c["patch_size"] ** 2
        self.raster = c.get("order", "random") == "raster"
        self.class_emb = nn.Embedding(c["class_num"], width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = nn.Linear(self.channels, width)
        self.z_proj_ln = nn.LayerNorm(width, 1e-6)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, self.buffer + self.seq_len, width))
        self.target_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, width))
        self.decoder_blocks = nn.ModuleList([Block(width, c["decoder_num_heads"], c["mlp_ratio"], eps)
                                             for _ in range(c["decoder_depth"])])
        self.decoder_norm = nn.LayerNorm(width, eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, width))
        self.diffloss = DiffLoss(Head(self.channels, c["diffloss_w"], c["diffloss_d"], width))

    unpatchify = MAR.unpatchify

    def buffer_rows(self, embedding, following):
        """Class embeddings [N, D] and the first positions [N] -> the trunk's first rows, [N, buffer, D]."""
        x = self.z_proj_ln(embedding.unsqueeze(1) + self.decoder_pos_embed_learned[:, : self.buffer])
        x = x.clone()
        x[:, -1] += self.target_pos_embed_learned[0, following]
        return x

    def token_row(self, token, position, following):
        """Tokens [N, C] at positions [N], with the positions that come next -> a row of each sequence, [N, 1, D]."""
        x = self.z_proj_ln(self.z_proj(token) + self.decoder_pos_embed_learned[0, self.buffer + position])
        return (x + self.target_pos_embed_learned[0, following]).unsqueeze(1)


def load_causal(config, path):
    return load(CausalMAR, config, path)


class Cache:
    """Keys and values of every block, [2, N, heads, rows, head width], filled from the left."""

    def __init__(self, blocks, n, heads, rows, width, dtype):
        self.kv = [torch.empty(2, n, heads, rows, width // heads, dtype=dtype) for _ in range(blocks)]
        self.rows = 0

    def append(self, block, k, v):
        """Stores k and v behind what there is; returns views of all."""
        end = self.rows + k.shape[2]
        kv = self.kv[block]
        kv[0][:, :, self.rows : end], kv[1][:, :, self.rows : end] = k, v
        return kv[0][:, :, :end], kv[1][:, :, :end]


class EagerAR(EagerSampler):
    """Plain PyTorch with a KV cache; float32, or under autocast if dtype is bfloat16."""

    def cache(self, n):
        m = self.model
        return Cache(m.config["decoder_depth"], n, m.config["decoder_num_heads"], m.buffer + m.seq_len - 1,
                     m.config["decoder_embed_dim"], self.dtype)

    def trunk(self, x, cache):
        """Rows [N, m, D] behind those of the cache -> z of the last one without its position, [N, D]."""
        for i, block in enumerate(self.model.decoder_blocks):
            a, (n, m, width) = block.attn, x.shape
            q, k, v = a.qkv(block.norm1(x)).reshape(n, m, 3, a.heads, width // a.heads).permute(2, 0, 3, 1, 4).unbind(0)
            k, v = cache.append(i, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=m > 1)
            x = x + a.proj(y.transpose(1, 2).reshape(n, m, width))
            x = x + block.mlp(block.norm2(x))
        cache.rows += m
        return self.model.decoder_norm(x)[:, -1]

    def head_rows(self, z, step, scale, guided, request, draws):
        sampled = self.head(z, step, scale, guided, request, draws)
        return sampled.chunk(2, dim=0)[0] if guided else sampled

    def sample(self, request, draws, clock):
        """Tokens [N, L, C]: one at a time, every row through the trunk once."""
        mar, n, length = self.model, request.batch, self.model.seq_len
        guided = request.cfg != 1.0
        orders = torch.arange(length).repeat(n, 1) if mar.raster else draws.orders(n, length)
        embedding = mar.fake_latent.repeat(n, 1) if request.labels is None else mar.class_emb(torch.tensor(request.labels))
        if guided:
            embedding = torch.cat([embedding, mar.fake_latent.repeat(n, 1)], dim=0)
        copies = 2 if guided else 1
        tokens = torch.zeros(n, length, mar.channels)
        images, cache, sampled = torch.arange(n), self.cache(copies * n), None
        for step in range(length):
            started = device.now()
            position = orders[:, step].repeat(copies)
            if step == 0:
                x = mar.buffer_rows(embedding, position)
            else:
                x = mar.token_row(sampled.repeat(copies, 1), orders[:, step - 1].repeat(copies), position)
            z = self.trunk(x, cache) + mar.diffusion_pos_embed_learned[0, position]
            decoded = device.now()
            scale = cfg_scale(request.cfg, request.cfg_schedule, length, length - step - 1)
            sampled = self.head_rows(z, step, scale, guided, request, draws)
            headed = device.now()
            tokens[images, orders[:, step]] = sampled
            clock.iteration(step, enc=0.0, dec=decoded - started, head=headed - decoded, total=device.now() - started, rows=len(z))
        return tokens


class CachedBlock(TunedBlock):
    """tuned.TunedBlock over new rows and a cache."""

    def forward(self, x, cache, index):
        q, k, v = self.split(self.qkv(self.norm1(x)), 3)
        k, v = cache.append(index, k, v)
        if x.shape[1] > 1:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = attention(q, k, v)
        x = self.proj.add(a.transpose(1, 2).reshape(x.shape), x)
        return self.fc2.add(self.fc1(self.norm2(x), "gelu"), x)


class Tuned(EagerAR):
    """The same with packed linear layers and the hoisted head; takes blocks and head away to free them."""

    def __init__(self, mar, dtype):
        mar.requires_grad_(False)
        self.model, self.dtype = mar, dtype
        self.blocks = [CachedBlock(b, dtype) for b in mar.decoder_blocks]
        self.norm = Norm(mar.decoder_norm, dtype)
        self.tuned_head = TunedHead(mar.diffloss.net, dtype)
        del mar.decoder_blocks, mar.diffloss

    def context(self):
        return torch.inference_mode()

    def prepare(self, request):
        self.tuned_head.time_table(request.diffusion)

    def trunk(self, x, cache):
        x = x.to(self.dtype)
        for i, block in enumerate(self.blocks):
            x = block.forward(x, cache, i)
        cache.rows += x.shape[1]
        return self.norm(x[:, -1])

    def head_rows(self, z, step, scale, guided, request, draws):
        return self.tuned_head.sample(z.to(self.dtype), scale, guided, request, step, draws)


SAMPLERS = {"eager": EagerAR, "tuned": Tuned}
