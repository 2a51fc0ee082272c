package engine

// Op names an operation of Kernels, for support tables, plans and errors.
type Op string

// Info describes a device. Peaks are measured, 0 where nobody measured.
type Info struct {
	Name       string // "cpu", "ref", "cuda:0"
	Model      string // "AMD EPYC", "NVIDIA H100"
	Arch       string // "avx512-bf16", "sm_90"
	Threads    int    // worker threads, or multiprocessors
	MemTotal   int64  // bytes
	MemFree    int64
	PeakF32    float64 // FLOP/s
	PeakBF16   float64
	PeakMemory float64 // bytes/s
	Truncates  bool    // sums of BF16 products are truncated, not rounded to nearest, as tensor cores do
	WorkingSet int64   // bytes of activations that the device is best given at a time; 0: no preference
	OwnMemory  bool    // what the host gives is copied to the device: few large copies are better than many small ones
	KeepsFP8   bool    // Pack keeps codes and scales of a W in FP8 beside its BF16 numbers
}

// Device owns memory and makes streams. Its methods may be called from any
// goroutine; a Stream belongs to one goroutine at a time.
type Device interface {
	Name() string
	Info() Info
	Supports(Op, DType) bool
	NewStream() (Stream, error)
	// Alloc returns memory aligned for any dtype; its contents are undefined
	// (NaN in debug mode). Fails with OutOfMemory, never aborts.
	Alloc(bytes int) (Buffer, error)
	// Pack prepares a weight matrix for Gemm, once; nil means the device wants
	// no packing. The source may be freed afterwards.
	Pack(PackArgs) (Packed, error)
	Close() error
}

// Footprint is a Device that says what it takes of its memory beside the bytes that it is asked for, so that a plan's count is a
// bound of what a run takes, and a near one.
type Footprint interface {
	// Block is what a buffer of so many bytes takes.
	Block(bytes int64) int64
	// PackedBytes is the size of the buffer that Pack makes, by W's shape, DType and FP8.
	PackedBytes(PackArgs) int64
	// StreamBytes is the size of the buffer that a stream has from its beginning; 0: none.
	StreamBytes() int64
	// HeadBytes and GroupNormBytes are the workspace that an op needs, by the shapes of its arguments. The ops of a stream share
	// one, which it keeps; where that is smaller, HeadSteps replaces it by one of take bytes, which later calls need.
	HeadBytes(HeadStepsArgs) (need, take int64)
	GroupNormBytes(GroupNormArgs) int64
}

// StreamHeld is what a stream holds of its device's memory for itself; 0 where it does not say.
func StreamHeld(s Stream) int64 {
	if h, ok := s.(interface{ Held() int64 }); ok {
		return h.Held()
	}
	return 0
}

// Packed is a weight in the device's own layout.
type Packed interface {
	Bytes() int
	Free() error
}

// Label names memory, a Buffer or a Packed, for the report of leaks of a device that keeps one.
func Label(memory any, name string) {
	if l, ok := memory.(interface{ Label(string) }); ok {
		l.Label(name)
	}
}

// Event marks a point of a stream.
type Event interface{ Close() error }

// Graph is a recorded sequence of kernels that can be launched again.
type Graph interface{ Close() error }

// Stream is an ordered queue of kernels. Calls enqueue; only Sync, CopyOut
// and Close wait. An error of an enqueued kernel surfaces at the latest in
// the next waiting call, with the op's name.
type Stream interface {
	Kernels
	Device() Device
	// CopyIn has taken the data when it returns. src holds the elements of the
	// contiguous tensor dst in its dtype, little endian.
	CopyIn(dst *Tensor, src []byte) error
	CopyOut(dst []byte, src *Tensor) error
	Copy(dst, src *Tensor) error // same dtype and shape, rows may be strided
	Fill(dst *Tensor, v float32) error
	Record() (Event, error)
	Wait(Event) error
	Capture(func() error) (Graph, error)
	Launch(Graph) error
	Sync() error
	Close() error
}
