package conformance

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"margo/engine"
)

// RaceOptions say how much Race does. Zero values are 1.
type RaceOptions struct {
	Workers int // goroutines, each with a stream for every case
	Rounds  int // of each worker
}

// RaceReport is what Race found.
type RaceReport struct {
	Cases    int      `json:"cases"`
	Streams  int      `json:"streams"` // at the same time
	Runs     int      `json:"runs"`    // cases computed, those for comparison not counted
	Failures []string `json:"failures,omitempty"`
	Elapsed  time.Duration
}

// Race is the race of many streams. A case of every op and dtype that the device has is computed alone
// first. Then workers do the same at once: each takes memory for all cases, in an order of its own, and
// enqueues every case on a stream of its own before it waits for any; then it reads the outputs, compares them
// bit for bit with those of the case alone, guards included, and gives the memory back, which another worker may get
// at once. A difference means that streams are not ordered with the copies, the memory or the workspace that
// they use.
func Race(dev engine.Device, opt RaceOptions) *RaceReport {
	start := time.Now()
	cases := representatives(dev)
	workers, rounds := max(opt.Workers, 1), max(opt.Rounds, 1)
	rep := &RaceReport{Cases: len(cases), Streams: workers * len(cases)}
	alone := make([]map[string][]uint32, len(cases))
	for i, c := range cases {
		if err := c.alone(dev, &alone[i]); err != nil {
			rep.Failures = append(rep.Failures, fmt.Sprintf("alone: %s: %v", c.Name, err))
		}
	}
	if len(rep.Failures) > 0 {
		rep.Elapsed = time.Since(start)
		return rep
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for k := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for round := range rounds {
				n, err := wave(dev, cases, alone, k*7+round)
				mu.Lock()
				rep.Runs += n
				if err != nil {
					rep.Failures = append(rep.Failures, fmt.Sprintf("worker %d, round %d: %v", k, round, err))
				}
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	rep.Elapsed = time.Since(start)
	return rep
}

// representatives are cases of small shapes, two of every op and dtype: those after a third and two thirds of the table's,
// since tables begin with empty shapes.
func representatives(dev engine.Device) (picked []*Case) {
	type kind struct {
		op engine.Op
		d  engine.DType
	}
	of := map[kind][]*Case{}
	var kinds []kind
	for _, c := range Cases() {
		k := kind{c.Op, c.DType}
		if c.Bench || c.Large || !dev.Supports(c.Op, c.DType) {
			continue
		}
		if of[k] == nil {
			kinds = append(kinds, k)
		}
		of[k] = append(of[k], c)
	}
	for _, k := range kinds {
		n := len(of[k])
		picked = append(picked, of[k][n/3])
		if n > 1 {
			picked = append(picked, of[k][max(2*n/3, n/3+1)])
		}
	}
	return picked
}

// alone computes a case with nothing else under way.
func (c *Case) alone(dev engine.Device, out *map[string][]uint32) (err error) {
	defer caught(func(e error) { err = e })
	e := newEnv(dev, c, 0)
	defer e.close()
	*out = e.run(c.build(e).run)
	return nil
}

// wave enqueues all cases, each on its stream, beginning with the one at shift, and compares them from the
// last to the first.
func wave(dev engine.Device, cases []*Case, alone []map[string][]uint32, shift int) (runs int, err error) {
	defer caught(func(e error) { err = errors.Join(err, e) })
	envs, works := make([]*env, len(cases)), make([]work, len(cases))
	defer func() {
		for _, e := range envs {
			if e != nil {
				e.close()
			}
		}
	}()
	at := func(i int) int { return (i + shift) % len(cases) }
	for i := range cases {
		k := at(i)
		envs[k] = newEnv(dev, cases[k], 0)
		works[k] = cases[k].build(envs[k])
		envs[k].upload()
	}
	for i := range cases {
		k := at(i)
		if err := works[k].run(envs[k].s); err != nil {
			return runs, fmt.Errorf("%s: %w", cases[k].Name, err)
		}
		runs++
	}
	for i := len(cases) - 1; i >= 0; i-- {
		k := at(i)
		if e := envs[k].differ(alone[k], envs[k].download()); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: not what it gives alone: %w", cases[k].Name, e))
		}
	}
	return runs, err
}
