package engine

// The kernels on a Ctx: each does nothing once an error has stuck, and sticks
// its own. They are the only way model code launches work.

// Gemm runs the kernel on c's stream.
func (c *Ctx) Gemm(a GemmArgs) {
	if c.err == nil {
		c.err = c.Stream.Gemm(a)
	}
}

// Attention runs the kernel on c's stream.
func (c *Ctx) Attention(a AttentionArgs) {
	if c.err == nil {
		c.err = c.Stream.Attention(a)
	}
}

// Norm runs the kernel on c's stream.
func (c *Ctx) Norm(a NormArgs) {
	if c.err == nil {
		c.err = c.Stream.Norm(a)
	}
}

// GatedAdd runs the kernel on c's stream.
func (c *Ctx) GatedAdd(a GatedAddArgs) {
	if c.err == nil {
		c.err = c.Stream.GatedAdd(a)
	}
}

// Rows runs the kernel on c's stream.
func (c *Ctx) Rows(a RowsArgs) {
	if c.err == nil {
		c.err = c.Stream.Rows(a)
	}
}

// Cast runs the kernel on c's stream.
func (c *Ctx) Cast(a CastArgs) {
	if c.err == nil {
		c.err = c.Stream.Cast(a)
	}
}

// TimestepEmbedding runs the kernel on c's stream.
func (c *Ctx) TimestepEmbedding(a TimestepEmbeddingArgs) {
	if c.err == nil {
		c.err = c.Stream.TimestepEmbedding(a)
	}
}

// Normal runs the kernel on c's stream.
func (c *Ctx) Normal(a NormalArgs) {
	if c.err == nil {
		c.err = c.Stream.Normal(a)
	}
}

// DiffusionStep runs the kernel on c's stream.
func (c *Ctx) DiffusionStep(a DiffusionStepArgs) {
	if c.err == nil {
		c.err = c.Stream.DiffusionStep(a)
	}
}

// HeadSteps runs the kernel on c's stream.
func (c *Ctx) HeadSteps(a HeadStepsArgs) {
	if c.err == nil {
		c.err = c.Stream.HeadSteps(a)
	}
}

// Conv2D runs the kernel on c's stream.
func (c *Ctx) Conv2D(a Conv2DArgs) {
	if c.err == nil {
		c.err = c.Stream.Conv2D(a)
	}
}

// GroupNorm runs the kernel on c's stream.
func (c *Ctx) GroupNorm(a GroupNormArgs) {
	if c.err == nil {
		c.err = c.Stream.GroupNorm(a)
	}
}

// Categorical runs the kernel on c's stream.
func (c *Ctx) Categorical(a CategoricalArgs) {
	if c.err == nil {
		c.err = c.Stream.Categorical(a)
	}
}

// Patchify runs the kernel on c's stream.
func (c *Ctx) Patchify(a PatchifyArgs) {
	if c.err == nil {
		c.err = c.Stream.Patchify(a)
	}
}
