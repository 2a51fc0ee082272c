package verify

import (
	"fmt"

	"margo/engine"
	"margo/engine/mar"
)

// scene is the state that the trunk starts from: tokens, what is masked and the
// class embedding, for S sequences of the trace (conditional ones first).
type scene struct {
	tokens  data // [S, L, C]
	class   data // [S, De]
	mask    string
	seqs    []mar.Seq
	masked  []int // row-major list of masked (sequence, position)
	visible int   // visible tokens of all sequences
}

// scene reads the tensors with the given names.
func (v *verifier) scene(err *error, tokens, mask, class string) scene {
	cfg := v.model.MAR
	s := scene{tokens: v.t.get(err, tokens, 3), class: v.t.get(err, class, 2), mask: mask}
	m := v.t.ints(err, mask, 2, 2)
	if *err != nil {
		return s
	}
	n := s.tokens.shape[0]
	if n == 0 {
		*err = v.t.unknown("tensor %s has no sequences", tokens)
		return s
	}
	v.t.is(err, tokens, s.tokens, n, cfg.Tokens(), cfg.TokenDim())
	v.t.is(err, mask, v.t.get(err, mask, 2), n, cfg.Tokens())
	v.t.is(err, class, s.class, n, cfg.EncoderEmbedDim)
	if *err != nil {
		return s
	}
	for i := range n {
		q := mar.Seq{Class: i, Image: i}
		for p := range cfg.Tokens() {
			q.Want = append(q.Want, int32(p))
			if m[i*cfg.Tokens()+p] != 0 {
				s.masked = append(s.masked, i*cfg.Tokens()+p)
			} else {
				q.Visible = append(q.Visible, int32(p))
			}
		}
		s.visible += len(q.Visible)
		s.seqs = append(s.seqs, q)
	}
	return s
}

// recorded reads enc_out and dec_out_z of the scene.
func (v *verifier) recorded(err *error, s scene, encName, zName string) (enc, z data) {
	cfg, n := v.model.MAR, len(s.seqs)
	enc, z = v.t.get(err, encName, 3), v.t.get(err, zName, 3)
	if *err == nil && s.visible%n != 0 { // the authors' code keeps equally many
		*err = v.t.unknown("tensor %s: %d sequences see %d tokens together; they must see equally many", s.mask, n, s.visible)
	}
	if *err == nil {
		v.t.is(err, encName, enc, n, cfg.BufferSize+s.visible/n, cfg.EncoderEmbedDim)
		v.t.is(err, zName, z, n, cfg.Tokens(), cfg.DecoderEmbedDim)
	}
	return enc, z
}

// wanting is the scene's sequences asking for some positions only.
func (s scene) wanting(rows []int, l int) []mar.Seq {
	out := append([]mar.Seq(nil), s.seqs...)
	for i := range out {
		out[i].Want = nil
	}
	for _, r := range rows {
		out[r/l].Want = append(out[r/l].Want, int32(r%l))
	}
	return out
}

// embed makes the encoder's input of the scene on a side.
func (s scene) embed(x *side, l *mar.Layout) *engine.Tensor {
	n, tokens, ch := s.tokens.shape[0], s.tokens.shape[1], s.tokens.shape[2]
	pos := make([]int32, n*tokens)
	for i := range pos {
		pos[i] = int32(i % tokens)
	}
	m := x.m.mar
	buf := m.EmbedBuffer(x.c, x.c.F32(s.class.v, s.class.shape...))
	tok := m.EmbedTokens(x.c, x.c.F32(s.tokens.v, n*tokens, ch), pos)
	return m.EncoderInput(x.c, buf, tok, l)
}

// pick keeps the listed rows of a [rows, cols] matrix.
func pick(v []float32, rows []int, cols int) []float32 {
	out := make([]float32, 0, len(rows)*cols)
	for _, r := range rows {
		out = append(out, v[r*cols:(r+1)*cols]...)
	}
	return out
}

// trunkStages compares encoder and decoder on a scene, with names from prefix:
// the encoder from tokens, the decoder from the recorded enc_out for all
// positions and for those of rows alone (the path that sampling takes).
func (v *verifier) trunkStages(prefix string, s scene, enc, z data, rows []int) []check {
	dd, l := v.model.MAR.DecoderEmbedDim, v.model.MAR.Tokens()
	decode := func(seqs []mar.Seq) func(x *side) *engine.Tensor {
		return func(x *side) *engine.Tensor {
			m := x.m.mar
			lay := m.NewLayout(x.c, seqs)
			e := x.upload(enc, x.c.Compute)
			return m.Decode(x.c, m.DecoderInput(x.c, e, lay), lay)
		}
	}
	checks := []check{
		one(prefix+"encoder", enc.v, func(x *side) *engine.Tensor {
			lay := x.m.mar.NewLayout(x.c, s.seqs)
			return x.m.mar.Encode(x.c, s.embed(x, lay), lay)
		}),
		one(prefix+"decoder, all positions", z.v, decode(s.seqs)),
	}
	if len(rows) > 0 {
		checks = append(checks, one(prefix+"decoder, predicted positions", pick(z.v, rows, dd), decode(s.wanting(rows, l))))
	}
	return checks
}

// upload puts recorded values [.., cols] on the side as a matrix of dtype d.
func (x *side) upload(d data, t engine.DType) *engine.Tensor {
	cols := d.shape[len(d.shape)-1]
	y := x.c.New(t, len(d.v)/max(cols, 1), cols)
	x.c.Upload(y, d.v)
	return y
}

// encdec compares a forward pass of the trunk, block by block.
func (v *verifier) encdec() error {
	var err error
	cfg := v.model.MAR
	s := v.scene(&err, "tokens", "mask", "class_embedding")
	enc, z := v.recorded(&err, s, "enc_out", "dec_out_z")
	if err != nil {
		return err
	}
	n := len(s.seqs)
	var checks []check
	if v.t.has("labels") {
		labels := v.t.ints(&err, "labels", 1, cfg.ClassNum)
		if err == nil && len(labels) != n {
			err = v.t.unknown("tensor labels has %d labels for %d sequences", len(labels), n)
		}
		if err == nil {
			checks = append(checks, one("class embedding", s.class.v, func(x *side) *engine.Tensor { return x.m.mar.ClassRows(x.c, labels) }))
		}
	}
	block := func(part string, i int, shape ...int) (in, out data) {
		get := func(end string) data {
			name := fmt.Sprintf("%s_block%d_%s", part, i, end)
			d := v.t.get(&err, name, 3)
			v.t.is(&err, name, d, shape...)
			return d
		}
		return get("in"), get("out")
	}
	for i := range cfg.EncoderDepth {
		if !v.t.has(fmt.Sprintf("enc_block%d_in", i)) {
			continue
		}
		in, out := block("enc", i, enc.shape...)
		if i == 0 {
			checks = append(checks, one("encoder input", in.v, func(x *side) *engine.Tensor { return s.embed(x, x.m.mar.NewLayout(x.c, s.seqs)) }))
		}
		checks = append(checks, one(fmt.Sprintf("encoder block %d", i), out.v, func(x *side) *engine.Tensor {
			return x.m.mar.Encoder[i].Forward(x.c, x.upload(in, engine.F32), x.m.mar.NewLayout(x.c, s.seqs).Encoder)
		}))
	}
	for i := range cfg.DecoderDepth {
		if !v.t.has(fmt.Sprintf("dec_block%d_in", i)) {
			continue
		}
		in, out := block("dec", i, n, cfg.BufferSize+cfg.Tokens(), cfg.DecoderEmbedDim)
		if i == 0 {
			checks = append(checks, one("decoder input", in.v, func(x *side) *engine.Tensor {
				return x.m.mar.DecoderInput(x.c, x.upload(enc, x.c.Compute), x.m.mar.NewLayout(x.c, s.seqs))
			}))
		}
		checks = append(checks, one(fmt.Sprintf("decoder block %d", i), out.v, func(x *side) *engine.Tensor {
			return x.m.mar.Decoder[i].Forward(x.c, x.upload(in, engine.F32), x.m.mar.NewLayout(x.c, s.seqs).Decoder)
		}))
	}
	if err != nil {
		return err
	}
	return v.all(append(checks, v.trunkStages("", s, enc, z, s.masked)...))
}
