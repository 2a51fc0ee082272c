package conformance

import "margo/engine"

// joined views all images as one tall image.
func joined(t *engine.Tensor) *engine.Tensor {
	u := *t
	u.Shape = []int{1, t.Shape[0] * t.Shape[1], t.Shape[2], t.Shape[3]}
	return &u
}

func imageMutants() []mutant {
	return []mutant{
		{name: "conv2d drops the bias", match: "^conv2d/", modes: []Mode{Oracle, Exact},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error { a.Bias = nil; return s.Conv2D(a) }},
		{name: "conv2d forgets the residual", match: "^conv2d/", modes: []Mode{Oracle},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error { a.Residual = nil; return s.Conv2D(a) }},
		{name: "conv2d pads on the other side", match: "^conv2d/", modes: []Mode{Oracle, Exact},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error {
				a.PadTop, a.PadLeft, a.PadBottom, a.PadRight = a.PadBottom, a.PadRight, a.PadTop, a.PadLeft
				return s.Conv2D(a)
			}},
		{name: "conv2d sees the neighbouring image", match: "^conv2d/", modes: []Mode{Oracle, Exact},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error {
				if a.Stride == 1 && a.Kernel == 3 && a.PadTop == 1 && a.PadBottom == 1 && !a.Upsample {
					a.X, a.Y = joined(a.X), joined(a.Y)
					if a.Residual != nil {
						a.Residual = joined(a.Residual)
					}
				}
				return s.Conv2D(a)
			}},
		{name: "conv2d truncates to BF16", match: "^conv2d/", modes: []Mode{Oracle, Exact},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error {
				return truncated(s, a.Y, func(y *engine.Tensor) error { a.Y = y; return s.Conv2D(a) })
			}},
		{name: "conv2d ignores the stride of pixels", match: "^conv2d/.*strided", modes: []Mode{NaN},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error { a.X = dense(a.X); return s.Conv2D(a) }},
		{name: "conv2d writes one element too many", match: "^conv2d/", modes: []Mode{Guards},
			conv: func(s engine.Stream, a engine.Conv2DArgs) error {
				if err := s.Conv2D(a); err != nil {
					return err
				}
				return behind(s, a.Y)
			}},
		{name: "group_norm mixes the images", match: "^group_norm/", modes: []Mode{Oracle, Batch},
			groupNorm: func(s engine.Stream, a engine.GroupNormArgs) error {
				a.X, a.Y = joined(a.X), joined(a.Y)
				return s.GroupNorm(a)
			}},
		{name: "group_norm has half as many groups", match: "^group_norm/", modes: []Mode{Oracle},
			groupNorm: func(s engine.Stream, a engine.GroupNormArgs) error {
				if a.Groups%2 == 0 {
					a.Groups /= 2
				}
				return s.GroupNorm(a)
			}},
		{name: "group_norm forgets the activation", match: "^group_norm/", modes: []Mode{Oracle},
			groupNorm: func(s engine.Stream, a engine.GroupNormArgs) error { a.Act = engine.Identity; return s.GroupNorm(a) }},
		{name: "group_norm has no eps", match: "^group_norm/", modes: []Mode{NaN, Oracle},
			groupNorm: func(s engine.Stream, a engine.GroupNormArgs) error { a.Eps = 0; return s.GroupNorm(a) }},
		{name: "patchify takes pixels before channels", match: "^patchify/", modes: []Mode{Exact},
			patchify: func(s engine.Stream, a engine.PatchifyArgs) error {
				if err := s.Patchify(a); err != nil || a.Inverse {
					return err
				}
				c, p := a.X.Shape[3], a.P*a.P
				u := changed(s, a.Y, func(_, _ int, v float32) float32 { return v })
				for i := 0; i < c*p; i++ { // (c, py, px) to (py, px, c)
					check(s.Copy(a.Y.Slice(i%p*c+i/p, i%p*c+i/p+1), u.Slice(i, i+1)))
				}
				return nil
			}},
		{name: "patchify only goes one way", match: "^patchify/", modes: []Mode{NaN},
			patchify: func(s engine.Stream, a engine.PatchifyArgs) error {
				if a.Inverse {
					return s.Fill(a.X, nan)
				}
				return s.Patchify(a)
			}},
	}
}
