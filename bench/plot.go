package bench

import (
	"fmt"
	"image/color"
	"io"
	"math"
	"sort"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// PlotFormats are the endings of the files that Plot writes.
var PlotFormats = []string{"png", "svg"}

// series is a line of the plot: one side of one model at rising work.
type series struct {
	name   string
	side   string
	points plotter.XYs // seconds per image, TFLOP per image
	labels []string
}

// Plot draws seconds per image against the authors' TFLOP per image, both logarithmic,
// a line for each model, dtype, batch and side, a point for each setting, and the
// machine's measured peak as a dashed line: no point can be left of it that does all of
// the authors' work. format is one of PlotFormats.
func (rep *Report) Plot(w io.Writer, format string) error {
	lines, err := rep.series()
	if err != nil {
		return err
	}
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s, %d cores (commit %s)", rep.Machine.CPU, rep.Machine.Cores, rep.Machine.Commit)
	p.X.Label.Text, p.Y.Label.Text = "seconds per image", "TFLOP per image, authors' algorithm"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = decades{}, decades{}
	p.X.Padding, p.Y.Padding = 0, 0
	p.Add(plotter.NewGrid())
	low, high := bounds(lines)
	var models []string
	for _, s := range lines {
		k := index(&models, s.name)
		shape, dashes := sideStyle(s.side)
		hue := palette[k%len(palette)]
		line, err := plotter.NewLine(s.points)
		if err != nil {
			return err
		}
		line.Color, line.Width, line.Dashes = hue, vg.Points(1.2), dashes
		dots, err := plotter.NewScatter(s.points)
		if err != nil {
			return err
		}
		dots.GlyphStyle = draw.GlyphStyle{Color: hue, Radius: vg.Points(3.5), Shape: shape}
		names, err := plotter.NewLabels(plotter.XYLabels{XYs: s.points, Labels: s.labels})
		if err != nil {
			return err
		}
		for i := range names.TextStyle {
			names.TextStyle[i] = text.Style{Color: hue, Font: font.From(plot.DefaultFont, vg.Points(8)), Handler: plot.DefaultTextHandler}
		}
		names.Offset = vg.Point{X: vg.Points(6), Y: vg.Points(-3)}
		p.Add(line, dots, names)
		p.Legend.Add(strings.TrimSpace(s.name+", "+s.side), line, dots)
	}
	for _, peak := range rep.peaks() {
		line, err := plotter.NewLine(plotter.XYs{{X: low.Y * 1e12 / peak.flops, Y: low.Y}, {X: high.Y * 1e12 / peak.flops, Y: high.Y}})
		if err != nil {
			return err
		}
		line.Color, line.Dashes, line.Width = color.Gray{110}, []vg.Length{vg.Points(5), vg.Points(4)}, vg.Points(1)
		p.Add(line)
		p.Legend.Add(fmt.Sprintf("peak %s, %.0f GFLOP/s", peak.dtype, peak.flops/1e9), line)
		low.X, high.X = math.Min(low.X, low.Y*1e12/peak.flops), math.Max(high.X, high.Y*1e12/peak.flops)
	}
	p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = low.X/1.15, high.X*1.6, low.Y/1.15, high.Y*1.15 // room for a label at the right
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.XOffs, p.Legend.YOffs = vg.Points(8), vg.Points(-6)
	p.Legend.TextStyle.Font.Size, p.Legend.Padding, p.Title.Padding = vg.Points(9), vg.Points(3), vg.Points(6)
	c, err := p.WriterTo(8.5*vg.Inch, 6*vg.Inch, format)
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	_, err = c.WriteTo(w)
	return err
}

// series are the lines, in the order of the rows.
func (rep *Report) series() ([]*series, error) {
	batches := map[int]bool{}
	for i := range rep.Rows {
		batches[rep.Rows[i].Batch] = true
	}
	var out []*series
	for i := range rep.Rows {
		r := &rep.Rows[i]
		x, y := r.Seconds()/float64(r.Batch), r.FLOPs/float64(r.Batch)/1e12
		if !(x > 0 && y > 0) || math.IsInf(x, 0) || math.IsInf(y, 0) {
			continue
		}
		name := r.Model + " " + r.DType
		if len(batches) > 1 {
			name += fmt.Sprintf(" batch %d", r.Batch)
		}
		var s *series
		for _, t := range out {
			if t.name == name && t.side == r.Side {
				s = t
			}
		}
		if s == nil {
			s = &series{name: name, side: r.Side}
			out = append(out, s)
		}
		s.points, s.labels = append(s.points, plotter.XY{X: x, Y: y}), append(s.labels, r.Settings())
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("plot: the report has no finished case to draw")
	}
	for _, s := range out {
		sort.Sort(s)
	}
	return out, nil
}

func (s *series) Len() int           { return len(s.points) }
func (s *series) Less(i, j int) bool { return s.points[i].Y < s.points[j].Y }
func (s *series) Swap(i, j int) {
	s.points[i], s.points[j] = s.points[j], s.points[i]
	s.labels[i], s.labels[j] = s.labels[j], s.labels[i]
}

func bounds(lines []*series) (low, high plotter.XY) {
	low, high = plotter.XY{X: math.Inf(1), Y: math.Inf(1)}, plotter.XY{}
	for _, s := range lines {
		for _, v := range s.points {
			low.X, low.Y = math.Min(low.X, v.X), math.Min(low.Y, v.Y)
			high.X, high.Y = math.Max(high.X, v.X), math.Max(high.Y, v.Y)
		}
	}
	return low, high
}

// peaks are those of the dtypes that occur, each value once.
func (rep *Report) peaks() (out []struct {
	dtype string
	flops float64
}) {
	for i := range rep.Rows {
		r := &rep.Rows[i]
		known := !(r.Peak > 0) || math.IsInf(r.Peak, 0)
		for k := range out {
			if out[k].flops == r.Peak {
				known = true
				if !strings.Contains(out[k].dtype, r.DType) {
					out[k].dtype += " and " + r.DType
				}
			}
		}
		if !known {
			out = append(out, struct {
				dtype string
				flops float64
			}{r.DType, r.Peak})
		}
	}
	return out
}

// index is the place of name in list, to which it is added if need be.
func index(list *[]string, name string) int {
	for i, s := range *list {
		if s == name {
			return i
		}
	}
	*list = append(*list, name)
	return len(*list) - 1
}

// palette is Okabe and Ito's, which colour-blind readers can tell apart.
var palette = []color.Color{
	color.RGBA{0, 114, 178, 255}, color.RGBA{213, 94, 0, 255}, color.RGBA{0, 158, 115, 255}, color.RGBA{204, 121, 167, 255},
	color.RGBA{86, 180, 233, 255}, color.RGBA{230, 159, 0, 255}, color.RGBA{0, 0, 0, 255},
}

func sideStyle(side string) (draw.GlyphDrawer, []vg.Length) {
	switch side {
	case "margo":
		return draw.CircleGlyph{}, nil
	case "pytorch tuned":
		return draw.TriangleGlyph{}, []vg.Length{vg.Points(4), vg.Points(2)}
	}
	return draw.CrossGlyph{}, []vg.Length{vg.Points(1), vg.Points(2)}
}

// decades are ticks at 1, 2 and 5 times powers of ten, written as plain numbers.
type decades struct{}

func (decades) Ticks(low, high float64) []plot.Tick {
	var out []plot.Tick
	for e := math.Floor(math.Log10(low)); math.Pow(10, e) <= high; e++ {
		for _, k := range []float64{1, 2, 5} {
			if v := k * math.Pow(10, e); v >= low && v <= high {
				out = append(out, plot.Tick{Value: v, Label: fmt.Sprintf("%.4g", v)})
			}
		}
	}
	return out
}
