"""Proves that the peer's DiT and causal models compute what they should.

    make peers && .peers/bin/python bench/peers/test_rivals.py

DiT replays recorded traces of the authors' code. The causal models have no published code: the cached form is compared
with one pass over all rows, and margo's own tests compare its cache in the same way. A limit is a share of
max|expected|.
"""

import json
import pathlib
import subprocess
import sys
import unittest

import torch
import torch.nn.functional as F

import causal
import dit
from draws import JointTraceDraws, RandomDraws
from mar_torch import CausalRequest, Clock, JointRequest
from schedule import cfg_scale, joint_diffusion
from test_peer import BF16, F32, GOLDENS, golden, off

TINY = GOLDENS / "dit_tiny.safetensors"
CAUSAL = dict(img_size=64, vae_stride=16, encoder_embed_dim=64, encoder_depth=0, encoder_num_heads=4, decoder_embed_dim=64,
              decoder_depth=3, decoder_num_heads=4, buffer_size=8, class_num=10, diffloss_d=2, diffloss_w=64, attention="causal")


class Joint(unittest.TestCase):
    def test_forward(self):
        g = golden("dit_forward")
        net = dit.load_dit(None, TINY)
        with torch.no_grad():
            self.assertLess(off(net(g["x"], g["t"], g["y"]), g["out"]), 2e-6)
            self.assertLess(off(net.forward_with_cfg(g["x"], g["cfg_t"], g["y"], 4.0), g["out_with_cfg4"]), 2e-6)
        self.assertLess(off(dit.position_embedding(64, 4), net.pos_embed), 1e-6)

    def test_tables(self):
        g = golden("dit_diffusion_tables")
        for respacing in ("10", "50", "250", "ddim10", "ddim50"):
            d, seen = joint_diffusion(respacing), 0
            for key, want in g.items():
                name, _, field = key.partition(".")
                if name == f"linear_{respacing}" and hasattr(d, field):
                    seen += 1
                    self.assertLess(off(torch.as_tensor(getattr(d, field)), want), 1e-12, key)
            self.assertGreater(seen, 5, respacing)

    def test_loops(self):
        """From the first draw to the last step, guidance of three channels; 4.4e-7 is the recording's own error."""
        for sampler in ("p", "ddim"):
            for scale in ("1.5", "4.0"):
                g = golden(f"dit_{sampler}_sample_loop_cfg{scale}")
                request = JointRequest(2, g["y"][:2].tolist(), "10", "ddpm" if sampler == "p" else "ddim", float(scale))
                for mode, build in dit.SAMPLERS.items():
                    with self.subTest(sampler=sampler, scale=scale, mode=mode):
                        s = build(dit.load_dit(None, TINY), F32)
                        with s.context():
                            s.prepare(request)
                            got = s.sample(request, JointTraceDraws(g), Clock())
                        self.assertLess(off(got, g["final"][:2]), 2e-6)

    def test_modes_agree(self):
        """Where there is no recording: guidance of all channels, no guidance, no class, a subset, bf16."""
        for dtype, limit in ((F32, 5e-6), (BF16, 6e-2)):
            for fields in (dict(cfg=3.0, cfg_channels="all"), dict(cfg=1.0), dict(cfg=2.0, labels=None), dict(cfg=2.0, subset=[0, 4, 9])):
                request = JointRequest(**{"batch": 2, "labels": [1, 1], "steps": "10", **fields})
                got = []
                for build in dit.SAMPLERS.values():
                    s = build(dit.load_dit(None, TINY), dtype)
                    g = {"z": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
                         "step_noise": torch.randn(10, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))}
                    clock = Clock()
                    with s.context():
                        s.prepare(request)
                        got.append(s.sample(request, JointTraceDraws(g), clock).clone())
                    self.assertEqual([r["index"] for r in clock.rows], sorted(request.subset))
                self.assertLess(off(got[1], got[0]), limit, (dtype, fields))

    def test_sizes(self):
        with torch.device("meta"):
            counts = {name: sum(p.numel() for p in dit.DiT(name).parameters()) for name in ("dit-l/2", "dit-xl/2")}
        self.assertEqual(counts, {"dit-l/2": 458_102_816, "dit-xl/2": 675_129_632})


def recomputed(model, tokens, orders, embedding, request, seed):
    """The tokens again: z of all positions by one pass over all rows without a cache, then the head for each."""
    n, length = tokens.shape[:2]
    rows = [model.buffer_rows(embedding, orders[:, 0].repeat(2))]
    for i in range(1, length):
        previous = tokens[torch.arange(n), orders[:, i - 1]]
        rows.append(model.token_row(previous.repeat(2, 1), orders[:, i - 1].repeat(2), orders[:, i].repeat(2)))
    x = torch.cat(rows, dim=1)
    for block in model.decoder_blocks:
        h, (m, rows_, width) = block.norm1(x), x.shape
        q, k, v = block.attn.qkv(h).reshape(m, rows_, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(rows_, rows_, dtype=torch.bool).tril()
        a = torch.softmax((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf), -1) @ v
        x = x + block.attn.proj(a.transpose(1, 2).reshape(m, rows_, width))
        x = x + block.mlp(block.norm2(x))
    z = model.decoder_norm(x)[:, model.buffer - 1 :]
    draws, out = RandomDraws(seed), torch.zeros_like(tokens)
    if not model.raster:
        draws.orders(n, length)
    eager = causal.EagerAR(model, F32)
    for i in range(length):
        scale = cfg_scale(request.cfg, request.cfg_schedule, length, length - i - 1)
        head = eager.head(z[:, i] + model.diffusion_pos_embed_learned[0, orders[:, i].repeat(2)], i, scale, True, request, draws)
        out[torch.arange(n), orders[:, i]] = head[:n]
    return out


class Causal(unittest.TestCase):
    REQUEST = CausalRequest(2, [3, 7], iters=16, head_steps=20, cfg=2.0)

    def sample(self, mode, dtype, config, draws=None):
        s = causal.SAMPLERS[mode](causal.load_causal(config, None), dtype)
        clock = Clock()
        with s.context():
            s.prepare(self.REQUEST)
            tokens = s.sample(self.REQUEST, draws or RandomDraws(5), clock).clone()
        self.assertEqual(len(clock.rows), 16)
        return tokens

    def test_cached_equals_recomputed(self):
        for order in ("raster", "random"):
            config = {**CAUSAL, "order": order}
            model = causal.load_causal(config, None)
            with torch.no_grad():
                tokens = self.sample("eager", F32, config)
                orders = torch.arange(16).repeat(2, 1) if order == "raster" else RandomDraws(5).orders(2, 16)
                embedding = torch.cat([model.class_emb(torch.tensor([3, 7])), model.fake_latent.repeat(2, 1)])
                again = recomputed(model, tokens, orders, embedding, self.REQUEST, 5)
            # The head amplifies an error of its input up to 2,000-fold with 20 steps; eps of f32 is 6e-8.
            self.assertLess(off(again, tokens), 2e-4, order)

    def test_modes_agree(self):
        """On draws that both take: the tuned mode draws an iteration's noise at once, without the second half's."""

        class Shared(RandomDraws):
            def __init__(self):
                super().__init__(0)

            def at(self, iteration, step, n, channels):
                return torch.randn(n, channels, generator=torch.Generator().manual_seed(1000 * iteration + step))

            def initial(self, iteration, *shape):
                return self.at(iteration, 999, *shape)

            def step(self, iteration, step, rows, channels):
                return self.at(iteration, step, 2, channels).repeat(rows // 2, 1)

            def steps(self, iteration, count, rows, channels):
                return torch.stack([self.at(iteration, k, rows, channels) for k in range(count)])

        config = {**CAUSAL, "order": "raster"}
        eager, tuned = (self.sample(mode, F32, config, Shared()) for mode in ("eager", "tuned"))
        self.assertLess(off(tuned, eager), 2e-4)

    def test_parameters(self):
        trunk = dict(encoder_embed_dim=768, encoder_depth=0, encoder_num_heads=12, decoder_embed_dim=768, decoder_depth=24,
                     decoder_num_heads=12, diffloss_d=6, diffloss_w=1024, attention="causal", order="raster")
        with torch.device("meta"):
            self.assertEqual(sum(p.numel() for p in causal.CausalMAR(trunk).parameters()), 207_282_720)


class Protocol(unittest.TestCase):
    def test_conversation(self):
        joint = {"cmd": "run", "batch": 2, "labels": [1, 2], "steps": "10", "cfg": 3.0, "subset": [0, 2]}
        single = {"cmd": "run", "batch": 1, "labels": [1], "iters": 16, "head_steps": 3, "cfg": 3.0}
        lines = [{"cmd": "load", "weights": str(TINY), "mode": "tuned", "dtype": "bf16", "threads": 1}, {**joint, "cmd": "warm"}, joint,
                 {**joint, "steps": "ddim10", "sampler": "ddim"}, {**joint, "iters": 3}, {**joint, "steps": "ddim999"}, {**joint, "labels": [1, 10]},
                 {"cmd": "load", "config": {**CAUSAL, "order": "raster"}, "mode": "eager", "threads": 1}, {**single, "cmd": "warm"}, single,
                 {**single, "iters": 8}, {**single, "subset": [1]},
                 {"cmd": "load", "config": {**CAUSAL, "head": "gmm"}}]
        server = subprocess.run([sys.executable, pathlib.Path(__file__).with_name("mar_torch.py")], capture_output=True, text=True,
                                input="".join(json.dumps(x) + "\n" for x in lines), timeout=300)
        self.assertEqual(server.returncode, 0, server.stderr)
        replies = [json.loads(x) for x in server.stdout.splitlines()]
        self.assertEqual(["error" in r for r in replies], [False] * 4 + [True] * 3 + [False] * 3 + [True] * 3, replies)
        self.assertGreater(replies[2]["denoiser"], 0)
        self.assertEqual(replies[2]["iterations"], 2)
        self.assertEqual(replies[9]["iterations"], 16)
        self.assertGreater(replies[9]["dec"], 0)


if __name__ == "__main__":
    unittest.main()
