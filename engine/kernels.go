package engine

// Kernels is the compute contract: one args struct per op, no allocation
// visible to the caller, no hidden state. All float tensors are F32 or BF16 as
// each op says; index tensors are I32. "Row r" is a row of the matrix view.
// An op with zero rows does nothing. Outputs never alias inputs unless said.
type Kernels interface {
	Gemm(GemmArgs) error
	Attention(AttentionArgs) error
	Norm(NormArgs) error
	GatedAdd(GatedAddArgs) error
	Rows(RowsArgs) error
	Cast(CastArgs) error
	TimestepEmbedding(TimestepEmbeddingArgs) error
	Normal(NormalArgs) error
	DiffusionStep(DiffusionStepArgs) error
	HeadSteps(HeadStepsArgs) error // fused; composition of the others defines it
	Conv2D(Conv2DArgs) error
	GroupNorm(GroupNormArgs) error
	Patchify(PatchifyArgs) error
	Categorical(CategoricalArgs) error
}

// Names of the ops, as they appear in errors, plans and support tables.
const (
	OpGemm              Op = "gemm"
	OpAttention         Op = "attention"
	OpNorm              Op = "norm"
	OpGatedAdd          Op = "gated_add"
	OpRows              Op = "rows"
	OpCast              Op = "cast"
	OpTimestepEmbedding Op = "timestep_embedding"
	OpNormal            Op = "normal"
	OpDiffusionStep     Op = "diffusion_step"
	OpHeadSteps         Op = "head_steps"
	OpConv2D            Op = "conv2d"
	OpGroupNorm         Op = "group_norm"
	OpPatchify          Op = "patchify"
	OpCategorical       Op = "categorical"
	// OpPagedAttention is Attention with Blocks: a name of its own, because a device
	// may have the one without the other.
	OpPagedAttention Op = "paged_attention"
)

// Ops lists every op of Kernels in the order of the interface, and then the
// optional forms that have a name of their own.
var Ops = []Op{OpGemm, OpAttention, OpNorm, OpGatedAdd, OpRows, OpCast, OpTimestepEmbedding,
	OpNormal, OpDiffusionStep, OpHeadSteps, OpConv2D, OpGroupNorm, OpPatchify, OpCategorical, OpPagedAttention}

// Activation is applied elementwise inside other ops.
type Activation uint8

const (
	Identity Activation = iota
	GELUErf             // x·Φ(x), exact (torch.nn.GELU())
	GELUTanh            // tanh approximation (DiT)
	SiLU                // x·σ(x)
)

func (a Activation) String() string {
	return [...]string{"none", "gelu", "gelu_tanh", "silu"}[a]
}

// PackArgs describes a weight W [N, K] (PyTorch's [out, in]) to be packed for
// Gemm in dtype DType. Convolution weights are packed as [Cout, kh·kw·Cin].
//
// FP8 says that every row of W is e4m3 numbers times a power of two, as
// RoundE4M3 makes them, and DType BF16. A device with kernels that read such
// codes keeps them beside (Info.KeepsFP8); to all others it is a W like any.
type PackArgs struct {
	W     *Tensor
	DType DType
	FP8   bool
}

// GemmArgs: Y = Residual + Gate ⊙ act(X·Wᵀ + Bias).
//
//	X [M,K]  F32 or BF16; an F32 X meets a BF16 W by being rounded to BF16
//	W [N',K] F32 or BF16; Packed, if not nil, is used in its place (W.Shape and
//	         W.DType stay valid even when W.Buf has been dropped)
//	N0       first row of W that is used: Y holds outputs N0 … N0+Y.Cols()-1
//	Bias [N'] F32 or nil, indexed like W's rows
//	Gate [G, N] F32 or nil: row r uses gate row r/GateRows
//	Residual [M,N] F32 or nil; may be Y itself
//	Y [M,N]  F32 or BF16
//
// Sums over K are F32.
type GemmArgs struct {
	X        *Tensor
	W        *Tensor
	Packed   Packed
	N0       int
	Bias     *Tensor
	Act      Activation
	Gate     *Tensor
	GateRows int
	Residual *Tensor
	Y        *Tensor
}

// AttentionArgs: O = softmax(Q·Kᵀ·Scale)·V for a batch of sequences of any
// lengths, each head by itself.
//
//	Q [MQ, H·Dh], K, V [MK, H·Dh], O [MQ, H·Dh], F32 or BF16 (all the same);
//	rows may be strided, so slices of one QKV tensor serve
//	QOff, KOff I32 [S+1]: sequence s owns rows QOff[s] … QOff[s+1]-1 of Q and O,
//	and KOff[s] … KOff[s+1]-1 of K and V. A sequence may have no queries.
//	QOffHost, KOffHost: the same numbers on the host (launch geometry)
//	Causal: query i of a sequence with q queries and k keys sees keys 0 … k-q+i
//	Blocks I32 [S, B] or nil, BlockSize ≥ 1: K and V are a paged cache of
//	K.Rows()/BlockSize blocks, and key j of sequence s is row j mod BlockSize of
//	block Blocks[s, ⌊j/BlockSize⌋]. KOff then holds running sums of lengths only:
//	sequence s has KOff[s+1]-KOff[s] keys, at most B·BlockSize. Entries of Blocks
//	behind a sequence's last key are not read; sequences may share blocks. Rows
//	of K and V that belong to no key may hold anything, NaN included.
//
// Dh ≤ 512. Softmax and sums are F32; in BF16 the probabilities are rounded to
// BF16 before they meet V. A query with no visible key gives zeros.
type AttentionArgs struct {
	Q, K, V, O         *Tensor
	Heads              int
	Scale              float32
	Causal             bool
	QOff, KOff         *Tensor
	QOffHost, KOffHost []int32
	Blocks             *Tensor
	BlockSize          int
}

// NormArgs: Y = (LN(X)·Weight + Bias)·(1 + Scale) + Shift, LN over columns
// with biased variance in two passes.
//
//	X [M,D] F32 or BF16, Y [M,D] F32 or BF16
//	Weight, Bias [D] F32 or nil (nil: 1 and 0)
//	Scale, Shift [G,D] F32 or nil; row r uses row r/ModRows
type NormArgs struct {
	X, Y         *Tensor
	Weight, Bias *Tensor
	Scale, Shift *Tensor
	ModRows      int
	Eps          float32
}

// GatedAddArgs: Y = X + Gate ⊙ H. X, Y [M,D] F32; H [M,D] F32 or BF16; Gate
// [G,D] F32 or nil (nil: 1), row r uses row r/GateRows. Y may be X.
type GatedAddArgs struct {
	X, H, Gate, Y *Tensor
	GateRows      int
}

// RowsArgs gathers, adds and scatters rows:
//
//	Y[IY[r]] = act(A[IA[r]] + B[IB[r]])   for r = 0 … Count-1
//
// A, B [·,D] F32 or BF16; B may be nil; Y [·,D] F32 or BF16. A nil index means r
// itself. A negative IA or IB adds nothing. The rows of Y that IY names must be
// different; the others are left alone. This one op assembles the inputs of
// encoder and decoder, adds positional embeddings and picks rows.
type RowsArgs struct {
	Y, A, B    *Tensor
	IY, IA, IB *Tensor // I32 [Count] or nil
	Count      int
	Act        Activation
}

// CastArgs: Y = X·Scale + Shift, with conversion between F32 and BF16.
// Same shape; rows may be strided.
type CastArgs struct {
	X, Y         *Tensor
	Scale, Shift float32
}

// TimestepEmbeddingArgs: with half = Dim/2 and f_j = MaxPeriod^(-j/half),
// Y[i] = [cos(t_i f_0) … cos(t_i f_{half-1}), sin(t_i f_0) … ] (diffloss.py
// TimestepEmbedder). T F32 [M], Y F32 [M, Dim], Dim even.
type TimestepEmbeddingArgs struct {
	T, Y      *Tensor
	MaxPeriod float32
}

// RNG names the draws of an op: see Philox and NormalAt.
type RNG struct {
	Seed    uint64
	Purpose Purpose
	Step    int
}

// NormalArgs: Y[r,c] = NormalAt(RNG, image, token, c), where IDs I32 [M,2] holds
// (token, image) of row r. Y F32 [M,C].
type NormalArgs struct {
	Y, IDs *Tensor
	RNG    RNG
}

// StepCoef holds what the reverse step needs of the schedule, computed in
// float64: mean = A·x − B·ε and log variance between MinLog and MaxLog
// (improved DDPM, learned range; P8, P16).
type StepCoef struct {
	Timestep       int     // original timestep, as the network sees it
	A, B           float64 // posterior_mean_coef1·√(1/ᾱ)+posterior_mean_coef2, posterior_mean_coef1·√(1/ᾱ−1)
	MinLog, MaxLog float64 // posterior_log_variance_clipped, log β
	Last           bool    // respaced index 0: no noise
}

// DiffusionStepArgs is one reverse step of token-wise diffusion:
//
//	ε = ε_u + s(ε_c − ε_u) with guidance, else ε_c
//	logvar = f·MaxLog + (1−f)·MinLog, f = (v+1)/2, v of the conditional row
//	X' = A·X − B·ε + exp(logvar/2)·Temperature·δ   (no δ when Coef.Last)
//
//	X, Y [n,C] F32 (Y may be X)
//	Out [R,2C] F32, R = n, or 2n with guidance: rows n … 2n-1 unconditional
//	Guidance [n] F32 or nil: s of each token
//	Noise [n,C] F32, or nil: drawn with RNG at IDs [n,2]
type DiffusionStepArgs struct {
	X, Y, Out   *Tensor
	Guidance    *Tensor
	Noise, IDs  *Tensor
	RNG         RNG
	Coef        StepCoef
	Temperature float32
}

// Matrix is a weight with its bias as HeadSteps takes them.
type Matrix struct {
	W      *Tensor // [N,K]
	Packed Packed
	Bias   *Tensor // [N] F32
}

// HeadBlock is one residual block of the diffusion head (MAR §4.1).
type HeadBlock struct {
	NormWeight, NormBias *Tensor // [W] F32
	Fc1, Fc2             Matrix  // [W,W]
}

// HeadWeights are the weights of SimpleMLPAdaLN in one dtype. Ada stacks all
// AdaLN linears: block 0 (shift, scale, gate), block 1 …, final (shift, scale):
// [(3d+2)W, W].
type HeadWeights struct {
	Input  Matrix // [W,C], always F32
	Blocks []HeadBlock
	Ada    Matrix
	Final  Matrix // [2C,W], always F32
	Eps    float32
}

// HeadStepsArgs runs len(Steps) reverse steps of the diffusion head for n
// tokens, first step first. One state x per token serves both halves of a
// guided pair.
//
//	X [n,C] F32: x_T in, x_0 out
//	Cond [R,W] F32: cond_embed(z); R = n, or 2n with guidance
//	Time [T,W] F32: time embedding of each step
//	Weights: in the compute dtype; Exact: in F32, for steps with Exact[i] set
//	Noise [T·n,C] F32 or nil: else drawn with RNG (Step = RNG.Step + i) at IDs [n,2]
//	Trace [T·n,C] F32 or nil: receives x after every step
//	Cancel: polled every step; non-zero stops with Cancelled
type HeadStepsArgs struct {
	X, Cond, Time *Tensor
	Weights       *HeadWeights
	Exact         *HeadWeights
	Steps         []StepCoef
	ExactStep     []bool
	Guidance      *Tensor
	Noise, IDs    *Tensor
	RNG           RNG
	Temperature   float32
	Trace         *Tensor
	Cancel        *uint32
	Scratch       int // bytes of memory the loop may take for itself, if it can do with them; 0: the device's default
}

// Conv2DArgs: Y = Residual + conv(up(X), W) + Bias in NHWC.
//
//	X [N,H,W,Cin] F32 or BF16
//	W [Cout, k·k·Cin] with columns ordered (ky, kx, cin), k = Kernel (1 or 3)
//	Upsample: nearest ×2 before the convolution (fused)
//	Stride 1 or 2; zero padding PadTop/PadLeft before, PadBottom/PadRight after
//	Bias [Cout] F32 or nil; Residual like Y, F32, may be Y
//	Y [N,Ho,Wo,Cout] F32 or BF16
type Conv2DArgs struct {
	X, W                                 *Tensor
	Packed                               Packed
	Bias, Residual, Y                    *Tensor
	Kernel, Stride                       int
	PadTop, PadLeft, PadBottom, PadRight int
	Upsample                             bool
}

// GroupNormArgs: Y = act(GN(X)·Weight + Bias), X, Y [N,H,W,C] NHWC, groups over
// consecutive channels, statistics per image and group in two passes.
type GroupNormArgs struct {
	X, Y         *Tensor
	Weight, Bias *Tensor // [C] F32
	Groups       int
	Eps          float32
	Act          Activation
}

// PatchifyArgs converts between an image X [N,H,W,C] F32 and tokens
// Y [N, (H/P)·(W/P), C·P·P] F32, columns ordered (c, py, px) as MAR's patchify
// (mar.py patchify). Inverse: Y is read and X written.
type PatchifyArgs struct {
	X, Y    *Tensor
	P       int
	Inverse bool
}

// CategoricalMethod says how Categorical turns uniform numbers into a category.
type CategoricalMethod uint8

const (
	Gumbel           CategoricalMethod = iota // argmax of a_k + g_k, g_k = −ln(−ln u_k)
	InverseTransform                          // the first k whose cumulative probability exceeds u
)

// CategoricalArgs draws one category for each of n rows (P1, P3, P4):
//
//	l = l_u + s(l_c − l_u) with guidance, else l_c
//	a = l/Temperature; at temperature 0 the largest l_k is taken and nothing drawn
//	TopK: categories with fewer than TopK larger ones stay; 0: all
//	TopP: of softmax over what TopK left, categories whose likelier ones sum to
//	less than TopP stay; 1: all. Equal logits stay or go together.
//	Gumbel: the k that stays with the largest a_k − ln(−ln u_k), u_k of element k
//	InverseTransform: with c_k = Σ exp(a_j − max a) over j ≤ k that stay, the first
//	k with c_k > u·c_K, u of element 0
//
//	Logits [R,K] F32, R = n, or 2n with guidance: rows n … 2n-1 unconditional
//	Guidance [n] F32 or nil: s of each row
//	RNG, IDs I32 [n,2]: u of element e is Uniform(word e mod 4 of Philox at
//	Counter(RNG, e, token, image)), as for Normal
//	Y I32 [n]: k + r·Stride for row r; with Stride = K it names row k of r's part
//	of a table [n·K, ·]
//	LogProb [n] F32 or nil: ln softmax(l)_k of the category drawn, at temperature
//	1 and over all categories: MaskGIT's confidence
//
// Equal candidates: the smallest k. Everything is computed in float64, so that
// the categories are the same on every device unless two candidates are within
// its rounding. A row with a NaN, or with +Inf, or without a finite logit gives
// Y = r·Stride and LogProb NaN. Categories of −Inf are never drawn.
type CategoricalArgs struct {
	Logits      *Tensor
	Guidance    *Tensor
	Y, LogProb  *Tensor
	Stride      int
	Temperature float32
	TopK        int
	TopP        float32
	Method      CategoricalMethod
	IDs         *Tensor
	RNG         RNG
}
