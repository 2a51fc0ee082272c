package mar

import (
	"margo/engine"
	"margo/engine/nn"
)

// Cache holds the keys and values of causal sequences (P23): for every block of
// the trunk a tensor of cache blocks, BlockSize rows each, and one table that
// says which blocks a sequence has, the same for all of the trunk. Memory is
// taken when the cache is made; sequences grow block by block, at their own
// pace, and need not be as long as each other.
type Cache struct {
	BlockSize int
	paged     bool             // the device attends over blocks; else keys are gathered first
	kv        []*engine.Tensor // [blocks·BlockSize, 2D] in the compute dtype: keys, values
	free      []int32
	blocks    [][]int32 // of each sequence
	rows      []int     // of each sequence
}

// CacheBlock is the BlockSize that NewCache is best given: the authors' buffer
// is one block.
const CacheBlock = 64

// NewCache makes a cache of blocks·size rows for seqs sequences in c's arena.
// paged: the device that c's kernels will run on supports OpPagedAttention
// (which a dry run on another device must be told).
func (m *Model) NewCache(c *engine.Ctx, seqs, blocks, size int, paged bool) *Cache {
	if c.Err() != nil {
		return nil
	}
	k := &Cache{BlockSize: size, paged: paged, blocks: make([][]int32, seqs), rows: make([]int, seqs)}
	for range m.Decoder {
		k.kv = append(k.kv, c.New(c.Compute, blocks*size, 2*m.Config.DecoderEmbedDim))
	}
	for b := blocks - 1; b >= 0; b-- {
		k.free = append(k.free, int32(b))
	}
	return k
}

// SeqRows is the most rows that a sequence of the model can have: the buffer and
// all tokens but the last, which nothing is predicted from.
func (m *Model) SeqRows() int { return m.Config.BufferSize + m.Config.Tokens() - 1 }

// CacheBlocks is the number of blocks of size rows that one sequence can need.
func (m *Model) CacheBlocks(size int) int { return (m.SeqRows() + size - 1) / size }

// CacheBytes is the memory of a cache of blocks blocks of size rows in dtype d.
func (m *Model) CacheBytes(blocks, size int, d engine.DType) int64 {
	return int64(len(m.Decoder)) * int64(blocks) * int64(size) * int64(2*m.Config.DecoderEmbedDim*d.Size())
}

// Len is the number of rows of sequence s.
func (k *Cache) Len(s int) int { return k.rows[s] }

// Drop forgets sequence s; its blocks serve others.
func (k *Cache) Drop(s int) {
	k.free = append(k.free, k.blocks[s]...)
	k.blocks[s], k.rows[s] = nil, 0
}

// Extension is what one call of Extend appends to a sequence.
type Extension struct {
	Seq   int // of the cache; each at most once in a call
	Class int // row of the class table that the buffer was made from
	Image int // the token of position p is row Image·L+p of the token table
	// Order are positions in the order of generation. The tokens of all but the
	// last are appended; z is given for the last. An empty sequence gets the
	// buffer before them.
	Order []int32
}

// appended is a batch of extensions on the device.
type appended struct {
	x             *engine.Tensor // [M, D]: rows of the trunk
	spans         nn.Spans       // of each extension's rows
	paging        nn.Paging
	last, lastPos *engine.Tensor // the row of each extension that z is asked of; its position
}

// Extend appends to sequences of a causal model and returns z of each
// extension's last position, [len(seqs), D] F32 (P22, P28). A row's input is the
// embedding of its own token, position included, plus that of the position that
// comes next, so any order works:
//
//	buffer row j          LN(class + pos_j), the last one + target_pos of Order[0]
//	token at Order[i]     LN(z_proj(token) + pos) + target_pos of Order[i+1]
//
// buffers and tokens are tables of EmbedBuffer and EmbedTokens. What is appended
// in one call or in several gives the same z.
func (m *Model) Extend(c *engine.Ctx, buffers, tokens *engine.Tensor, k *Cache, seqs []Extension) *engine.Tensor {
	if c.Poll() {
		return nil
	}
	z := c.New(engine.F32, len(seqs), m.Config.DecoderEmbedDim)
	c.Scoped(func() {
		a := m.append(c, buffers, tokens, k, seqs)
		if a == nil {
			return
		}
		x := a.x
		for i, b := range m.Decoder {
			a.paging.KV = k.kv[i]
			x = b.ForwardCached(c, x, a.spans, &a.paging)
		}
		if c.Err() != nil {
			return
		}
		y := m.DecoderOut.Forward(c, nn.Gather(c, x, a.last), engine.F32)
		c.Rows(engine.RowsArgs{Y: z, A: y, B: m.HeadPos.T, IB: a.lastPos, Count: len(seqs)})
	})
	return z
}

// append gives every extension its place in the cache and makes the trunk's input.
func (m *Model) append(c *engine.Ctx, buffers, tokens *engine.Tensor, k *Cache, seqs []Extension) *appended {
	l, b := m.Config.Tokens(), m.Config.BufferSize
	bad := func(i int, format string, args ...any) *appended {
		c.Fail(engine.Errorf("extend", engine.Invalid, "extension %d: "+format, append([]any{i}, args...)...))
		return nil
	}
	var bufTo, buf, bufTarget, tokTo, tok, tokTarget, cacheRow, last, lastPos, table, all []int32
	spans, keys := []int32{0}, []int32{0}
	row, seen, width := 0, map[int]bool{}, 0
	for i, s := range seqs {
		if s.Seq < 0 || s.Seq >= len(k.rows) || seen[s.Seq] || len(s.Order) == 0 {
			return bad(i, "sequence %d of %d, with %d positions", s.Seq, len(k.rows), len(s.Order))
		}
		seen[s.Seq] = true
		for _, p := range s.Order {
			if p < 0 || int(p) >= l {
				return bad(i, "position %d of %d", p, l)
			}
		}
		first := k.rows[s.Seq]
		if first == 0 {
			for j := range b {
				bufTo, buf = append(bufTo, int32(row+j)), append(buf, int32(s.Class*b+j))
				target := int32(-1) // a negative index adds nothing
				if j == b-1 {
					target = s.Order[0]
				}
				bufTarget = append(bufTarget, target)
			}
			row += b
		}
		for j, p := range s.Order[:len(s.Order)-1] {
			tokTo, tok, tokTarget = append(tokTo, int32(row)), append(tok, int32(s.Image*l)+p), append(tokTarget, s.Order[j+1])
			row++
		}
		n := row - int(spans[i])
		if n == 0 {
			return bad(i, "sequence %d has a token already and is given none", s.Seq)
		}
		if first+n > m.SeqRows() {
			return bad(i, "%d rows, a sequence has at most %d", first+n, m.SeqRows())
		}
		for len(k.blocks[s.Seq])*k.BlockSize < first+n {
			if len(k.free) == 0 {
				c.Fail(engine.Errorf("extend", engine.OutOfMemory, "the cache of %d rows is full", k.kv[0].Rows()))
				return nil
			}
			k.blocks[s.Seq] = append(k.blocks[s.Seq], k.free[len(k.free)-1])
			k.free = k.free[:len(k.free)-1]
		}
		at := func(r int) int32 { return k.blocks[s.Seq][r/k.BlockSize]*int32(k.BlockSize) + int32(r%k.BlockSize) }
		for r := first; r < first+n; r++ {
			cacheRow = append(cacheRow, at(r))
		}
		k.rows[s.Seq] = first + n
		if !k.paged {
			for r := range first + n {
				all = append(all, at(r))
			}
		}
		width = max(width, len(k.blocks[s.Seq]))
		last, lastPos = append(last, int32(row-1)), append(lastPos, s.Order[len(s.Order)-1])
		spans, keys = append(spans, int32(row)), append(keys, keys[i]+int32(first+n))
	}
	for _, s := range seqs {
		own := k.blocks[s.Seq]
		table = append(table, own...)
		for range width - len(own) {
			table = append(table, -1)
		}
	}
	t := upload(c, bufTo, buf, bufTarget, tokTo, tok, tokTarget, cacheRow, last, lastPos, table, all, spans, keys)
	if c.Err() != nil {
		return nil
	}
	a := &appended{last: t[7], lastPos: t[8], spans: nn.Spans{Off: t[11], Host: spans}}
	a.x = c.New(engine.F32, row, m.Config.DecoderEmbedDim)
	c.Rows(engine.RowsArgs{Y: a.x, A: buffers, IA: t[1], IY: t[0], B: m.TargetPos.T, IB: t[2], Count: len(buf)})
	c.Rows(engine.RowsArgs{Y: a.x, A: tokens, IA: t[4], IY: t[3], B: m.TargetPos.T, IB: t[5], Count: len(tok)})
	a.paging = nn.Paging{Rows: t[6], Keys: nn.Spans{Off: t[12], Host: keys}, BlockSize: k.BlockSize}
	if k.paged {
		a.paging.Blocks = t[9].Reshape(len(seqs), width)
	} else {
		a.paging.All = t[10]
	}
	return a
}
