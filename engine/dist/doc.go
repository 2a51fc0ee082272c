// Package dist makes several processes one group of ranks: FromEnv reads who and
// where a process is from its launcher's variables, Join brings the ranks together
// over TCP, and a Group is an engine.Comm whose tensors travel through the host.
//
// The group is a star: every rank is connected with rank 0, which adds in the order
// of ranks. It serves devices that have nothing better, and what is to be exchanged
// before they have it. Traffic is neither encrypted nor authenticated beyond the
// job's name: as with MPI and torchrun, the network between ranks is trusted.
package dist
