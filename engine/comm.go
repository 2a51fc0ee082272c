package engine

// Comm is a group of Size ranks that compute together: each has a device of its
// own, and all call the same collectives in the same order with tensors of the
// same dtypes and numbers of elements. A Comm belongs to one goroutine at a time.
//
// AllReduce and Broadcast come after what was enqueued on the stream, and before what is enqueued
// later. Like other ops they may return once they are enqueued, without waiting for any rank.
//
// A rank that calls another collective, disagrees about a tensor, is gone or does
// not come within the group's time limit is an error of kind CommFault on every
// rank that takes part: of that call or, at the latest, of the next one that waits for its
// stream or for an event recorded behind it, with the collective's name. Tensors are undefined then. The group is unusable
// from then on: every later call returns that error.
type Comm interface {
	Rank() int // 0 … Size-1
	Size() int
	// AllReduce replaces each tensor t, contiguous and of any dtype, by Σ_r t_r over the
	// ranks. F32 and BF16 are added in F32 in the order ((t_0 + t_1) + t_2) + …, and
	// BF16 is rounded once, at the end, so that all ranks get the same bits; I32 wraps
	// around. An implementation that adds in another order says so.
	AllReduce(s Stream, t ...*Tensor) error
	// Broadcast replaces each tensor by that of rank root.
	Broadcast(s Stream, root int, t ...*Tensor) error
	// Barrier returns when every rank has called it, and this rank's collectives are done.
	Barrier() error
	// Close leaves the group. It waits for no rank that is late: collectives of this rank that its device has not
	// done are errors then. Ranks that call Barrier before part in peace.
	Close() error
}
