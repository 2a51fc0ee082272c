package dit

// CountFLOPs counts the multiply-adds, as 2, of the authors' code for one image: the
// whole network at every step, its embeddings and modulations included, and everything
// twice with guidance. It is the work that speeds are compared by, not what margo does.
func CountFLOPs(cfg *Config, steps int, guided bool) float64 {
	l, d, h, c := float64(cfg.Tokens()), float64(cfg.HiddenSize), float64(cfg.Hidden()), float64(cfg.TokenDim())
	block := 2*l*d*(4*d+2*h) + 4*l*l*d + 2*6*d*d
	once := 2*l*c*d + 2*(frequencyDim*d+d*d) + 2*2*d*d + 2*l*d*2*c
	f := float64(steps) * (float64(cfg.Depth)*block + once)
	if guided {
		f *= 2
	}
	return f
}
