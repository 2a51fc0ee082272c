package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
)

// progress reports work as a bar on a terminal, as log lines elsewhere, or not
// at all.
type progress struct {
	mode string // bar, log, off
	unit string // what is counted, plural: "images"
	term *console
	log  *logrus.Logger
	last time.Time
}

// state of the work.
type state struct {
	done, total   int // units complete, and all
	elapsed, left time.Duration
	rate          float64 // units a second
}

const (
	barEvery = 100 * time.Millisecond
	logEvery = 10 * time.Second
)

// newProgress resolves mode auto: a bar where a person looks.
func newProgress(mode, unit string, term *console, log *logrus.Logger) (*progress, error) {
	p := &progress{mode: mode, unit: unit, term: term, log: log}
	switch mode {
	case "auto":
		if p.mode = "log"; term.IsTerminal() {
			p.mode = "bar"
		}
	case "bar", "log", "off":
	default:
		return nil, usagef("--progress: %q is not a mode; use auto, bar, log or off", mode)
	}
	return p, nil
}

// update shows the state, unless that was done a moment ago.
func (p *progress) update(now time.Time, s state) {
	switch {
	case p.mode == "bar" && now.Sub(p.last) >= barEvery:
		const width = 24
		full := int(s.fraction() * width)
		p.term.SetStatus("[" + strings.Repeat("#", full) + strings.Repeat("-", width-full) + "] " + s.text(p.unit))
	case p.mode == "log" && p.last.IsZero(): // short work needs no line
	case p.mode == "log" && now.Sub(p.last) >= logEvery:
		p.log.Info(s.text(p.unit))
	default:
		return
	}
	p.last = now
}

// finish removes the bar.
func (p *progress) finish() {
	if p.mode == "bar" {
		p.term.SetStatus("")
	}
}

// fraction of the work that is done, parts of units included.
func (s state) fraction() float64 {
	if s.total == 0 || s.done >= s.total {
		return 1
	}
	if all := s.elapsed + s.left; all > 0 && s.rate > 0 {
		return float64(s.elapsed) / float64(all)
	}
	return float64(s.done) / float64(s.total)
}

// text is "37%  3/8 images  1.2 images/s  4s left".
func (s state) text(unit string) string {
	out := fmt.Sprintf("%3.0f%%  %d/%d %s", 100*s.fraction(), s.done, s.total, unit)
	if s.rate > 0 && s.elapsed > time.Second/2 && s.done < s.total {
		out += fmt.Sprintf("  %s  %s left", rate(s.rate, unit), duration(s.left))
	}
	return out
}

// rate prefers a number a person can imagine: "12.3 images/s", "8.1 s/image".
func rate(perSecond float64, unit string) string {
	if perSecond >= 1 || perSecond <= 0 {
		return fmt.Sprintf("%.3g %s/s", perSecond, unit)
	}
	return fmt.Sprintf("%.3g s/%s", 1/perSecond, strings.TrimSuffix(unit, "s"))
}

// duration is "45s", "3m20s", "2h05m".
func duration(d time.Duration) string {
	switch s := int(d.Round(time.Second).Seconds()); {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	default:
		return fmt.Sprintf("%dh%02dm", s/3600, s%3600/60)
	}
}
