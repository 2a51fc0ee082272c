package verify

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"

	"margo/engine"
	"margo/engine/ref"
)

// FP8 costs what three bits of mantissa cost: a uniform error of half of the last place, at most 1/16 of a number.
func TestFP8(t *testing.T) {
	o := Options{Model: goldens + "mar_tiny.safetensors", Trace: goldens + "mar_diffloss_net.safetensors", Device: ref.New(ref.Rounded)}
	e, err := FP8(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", *e)
	within := func(what string, v, low, high float64) {
		t.Helper()
		if !(v >= low && v <= high) {
			t.Errorf("%s is %g, want %g to %g", what, v, low, high)
		}
	}
	within("the weights' error", e.Weights, 0.02, 0.04)
	within("the weights' error in bf16", e.BF16, 0.02/32, 0.04/16)
	within("ε's error", e.Eps, 1e-3, 0.2)
	within("ε from the recorded, bf16", e.EpsBF16, 1e-5, e.EpsFP8)
	sum := 0.0
	for _, l := range e.Layers {
		within(l.Name, l.Weights, 0.02, 0.04)
		within(l.Name+" alone", l.Eps, 1e-6, e.Eps)
		sum += l.Eps * l.Eps
	}
	// Errors of layers are independent, so their squares add, more or less.
	within("all layers together", e.Eps, math.Sqrt(sum)/2, 2*math.Sqrt(sum))

	o.Trace = goldens + "mar_encdec_vis6.safetensors"
	if _, err := FP8(context.Background(), o); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "not of a head's network") {
		t.Errorf("another trace: %v", err)
	}
	o.Model = goldens + "dit_tiny.safetensors"
	if _, err := FP8(context.Background(), o); !errors.Is(err, engine.Invalid) || !strings.Contains(err.Error(), "no diffusion head") {
		t.Errorf("a DiT: %v", err)
	}
}
