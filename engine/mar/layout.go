package mar

import (
	"slices"

	"margo/engine"
	"margo/engine/nn"
)

// Seq is one sequence of the trunk.
type Seq struct {
	Class   int     // row of the class table given to EmbedBuffer
	Image   int     // the token of position p is row Image·L+p of the token table
	Visible []int32 // positions of known tokens, ascending
	Want    []int32 // positions whose z is asked for, ascending
}

// Layout is a ragged batch of sequences with every index list that the trunk
// needs, on the device. The encoder has B buffer rows and then the visible
// tokens of each sequence, the decoder B+L rows, and z the wanted positions.
type Layout struct {
	Seqs                  []Seq
	Encoder, Decoder, Out nn.Spans

	encBufTo, encBuf        *engine.Tensor // row of x, row of the buffer table
	encTokTo, encTok        *engine.Tensor // row of x, row of the token table
	decKnownTo, decKnown    *engine.Tensor // per encoder row: row of x, row of DecoderPos
	decMaskTo, decMask      *engine.Tensor // per masked token: row of x, row of DecoderPos
	zeros, outRow, outPos   *engine.Tensor // as many zeros as masked tokens; rows of x; positions
	nBuf, nTok, nMask, nOut int
}

// NewLayout takes seqs to the device, into c's arena. Positions must be below L
// and ascending; an encoder sequence may have no visible token.
func (m *Model) NewLayout(c *engine.Ctx, seqs []Seq) *Layout {
	if c.Err() != nil {
		return nil
	}
	l, b := m.Config.Tokens(), m.Config.BufferSize
	for i, s := range seqs {
		for _, list := range [][]int32{s.Visible, s.Want} {
			for j, p := range list {
				if p < 0 || int(p) >= l || j > 0 && list[j-1] >= p {
					c.Fail(engine.Errorf("layout", engine.Invalid, "sequence %d: positions must ascend within 0..%d", i, l-1))
					return nil
				}
			}
		}
	}
	var encBufTo, encBuf, encTokTo, encTok, decKnownTo, decKnown, decMaskTo, decMask, outRow, outPos []int32
	enc, dec, out := []int32{0}, []int32{0}, []int32{0}
	row, base := 0, 0
	for _, s := range seqs {
		for j := range b {
			encBufTo = append(encBufTo, int32(row+j))
			encBuf = append(encBuf, int32(s.Class*b+j))
			decKnownTo = append(decKnownTo, int32(base+j))
			decKnown = append(decKnown, int32(j))
		}
		row += b
		known := make([]bool, l)
		for _, p := range s.Visible {
			known[p] = true
			encTokTo = append(encTokTo, int32(row))
			encTok = append(encTok, int32(s.Image*l)+p)
			decKnownTo = append(decKnownTo, int32(base+b)+p)
			decKnown = append(decKnown, int32(b)+p)
			row++
		}
		for p, k := range known {
			if !k {
				decMaskTo = append(decMaskTo, int32(base+b+p))
				decMask = append(decMask, int32(b+p))
			}
		}
		for _, p := range s.Want {
			outRow = append(outRow, int32(base+b)+p)
			outPos = append(outPos, p)
		}
		base += b + l
		enc, dec, out = append(enc, int32(row)), append(dec, int32(base)), append(out, int32(len(outRow)))
	}
	t := upload(c, encBufTo, encBuf, encTokTo, encTok, decKnownTo, decKnown, decMaskTo, decMask,
		make([]int32, len(decMask)), outRow, outPos, enc, dec, out)
	if c.Err() != nil {
		return nil
	}
	return &Layout{
		Seqs:     slices.Clone(seqs),
		encBufTo: t[0], encBuf: t[1], encTokTo: t[2], encTok: t[3], decKnownTo: t[4], decKnown: t[5],
		decMaskTo: t[6], decMask: t[7], zeros: t[8], outRow: t[9], outPos: t[10],
		Encoder: nn.Spans{Off: t[11], Host: enc}, Decoder: nn.Spans{Off: t[12], Host: dec}, Out: nn.Spans{Off: t[13], Host: out},
		nBuf: len(encBuf), nTok: len(encTok), nMask: len(decMask), nOut: len(outRow),
	}
}

// upload copies lists to the device in one piece and returns them one by one.
func upload(c *engine.Ctx, lists ...[]int32) []*engine.Tensor {
	const align = 64 // elements: each list begins as aligned as a tensor of its own
	var all []int32
	at := make([]int, len(lists))
	for i, l := range lists {
		at[i] = len(all)
		all = append(all, l...)
		for len(all)%align != 0 {
			all = append(all, 0)
		}
	}
	t := c.I32(all)
	if c.Err() != nil {
		return nil
	}
	out := make([]*engine.Tensor, len(lists))
	for i, l := range lists {
		out[i] = engine.NewTensor(t.Buf, t.Off+4*at[i], engine.I32, len(l))
	}
	return out
}
