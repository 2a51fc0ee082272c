package engine

// Unimplemented can be embedded by a device's stream: every op fails with
// Unsupported until it is overridden, so that a new op breaks no device.
type Unimplemented struct{ DeviceName string }

func (u Unimplemented) no(op Op) error {
	return &Error{Op: string(op), Kind: Unsupported, Device: u.DeviceName}
}

// Gemm fails with Unsupported.
func (u Unimplemented) Gemm(GemmArgs) error { return u.no(OpGemm) }

// Attention fails with Unsupported.
func (u Unimplemented) Attention(AttentionArgs) error { return u.no(OpAttention) }

// Norm fails with Unsupported.
func (u Unimplemented) Norm(NormArgs) error { return u.no(OpNorm) }

// GatedAdd fails with Unsupported.
func (u Unimplemented) GatedAdd(GatedAddArgs) error { return u.no(OpGatedAdd) }

// Rows fails with Unsupported.
func (u Unimplemented) Rows(RowsArgs) error { return u.no(OpRows) }

// Cast fails with Unsupported.
func (u Unimplemented) Cast(CastArgs) error { return u.no(OpCast) }

// TimestepEmbedding fails with Unsupported.
func (u Unimplemented) TimestepEmbedding(TimestepEmbeddingArgs) error {
	return u.no(OpTimestepEmbedding)
}

// Normal fails with Unsupported.
func (u Unimplemented) Normal(NormalArgs) error { return u.no(OpNormal) }

// DiffusionStep fails with Unsupported.
func (u Unimplemented) DiffusionStep(DiffusionStepArgs) error { return u.no(OpDiffusionStep) }

// HeadSteps fails with Unsupported.
func (u Unimplemented) HeadSteps(HeadStepsArgs) error { return u.no(OpHeadSteps) }

// Conv2D fails with Unsupported.
func (u Unimplemented) Conv2D(Conv2DArgs) error { return u.no(OpConv2D) }

// GroupNorm fails with Unsupported.
func (u Unimplemented) GroupNorm(GroupNormArgs) error { return u.no(OpGroupNorm) }

// Categorical fails with Unsupported.
func (u Unimplemented) Categorical(CategoricalArgs) error { return u.no(OpCategorical) }

// Patchify fails with Unsupported.
func (u Unimplemented) Patchify(PatchifyArgs) error { return u.no(OpPatchify) }
