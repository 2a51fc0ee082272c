package bench

import (
	"encoding/json"
	"math"
)

// JSON has no NaN and no infinity, and package json refuses a whole document
// for one of them: such a number, of a broken clock or a file's setting, is
// written as null.
func finite(v float64) *float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return nil
	}
	return &v
}

// MarshalJSON writes a run.
func (r Run) MarshalJSON() ([]byte, error) {
	parts := map[string]*float64{}
	for name, v := range r.Parts {
		parts[name] = finite(v)
	}
	if finite(r.Joules) == nil {
		r.Joules = 0
	}
	if finite(r.PeakThen) == nil {
		r.PeakThen = 0
	}
	return json.Marshal(struct {
		Seconds  *float64            `json:"seconds"`
		Parts    map[string]*float64 `json:"parts"`
		Joules   float64             `json:"joules,omitempty"`
		PeakThen float64             `json:"peak_then_flops,omitempty"`
	}{finite(r.Seconds), parts, r.Joules, r.PeakThen})
}

// MarshalJSON writes a row with the figures that the table prints.
func (r Row) MarshalJSON() ([]byte, error) {
	type plain Row // fields of the same name outside it win
	return json.Marshal(struct {
		plain
		CFG             *float64 `json:"cfg"`
		FLOPs           *float64 `json:"flops_authors"`
		OwnFLOPs        *float64 `json:"flops_own"`
		Peak            *float64 `json:"peak_flops"`
		SecondsPerImage *float64 `json:"seconds_per_image"`
		ImagesPerSecond *float64 `json:"images_per_s"`
		Spread          *float64 `json:"spread"`
		PeakShare       *float64 `json:"peak_share"`
		ShareThen       *float64 `json:"peak_share_then,omitempty"`
	}{plain(r), finite(r.CFG), finite(r.FLOPs), finite(r.OwnFLOPs), finite(r.Peak), finite(r.Seconds() / float64(r.Batch)),
		finite(r.ImagesPerSecond()), finite(Spread(r.seconds())), finite(r.PeakShare()), finite(r.ShareThen())})
}

// MarshalJSON writes a machine.
func (m Machine) MarshalJSON() ([]byte, error) {
	type plain Machine
	return json.Marshal(struct {
		plain
		PeakF32 *float64 `json:"peak_f32_flops"`
		PeakB16 *float64 `json:"peak_bf16_flops"`
		ReadBW  *float64 `json:"read_bytes_per_s"`
	}{plain(m), finite(m.PeakF32), finite(m.PeakB16), finite(m.ReadBW)})
}
