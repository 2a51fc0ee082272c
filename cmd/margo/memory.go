package main

import (
	"github.com/sirupsen/logrus"

	"margo/engine"
	"margo/engine/load"
	"margo/engine/plan"
)

// checkMemory refuses a job that the device cannot hold, before anything is
// loaded: the model, the tokenizer and the largest batch are laid out on a
// device that only counts, beside the bytes that the output keeps (all devices
// compute in the host's memory). A batch that nobody asked for is made smaller
// first.
func (j *job) checkMemory(batchGiven bool, dev engine.Device, encode bool, output int64, log *logrus.Logger) error {
	free := dev.Info().MemFree
	if free <= 0 {
		return nil
	}
	asked := j.batch
	for {
		need, err := j.memory(dev, encode)
		if err != nil {
			return err
		}
		if need <= free-output {
			if j.batch < asked {
				log.Infof("batch of %d, for want of memory", j.batch)
			}
			return nil
		}
		last := batchGiven || j.batch == 1
		if output > free || last && need <= free {
			return failf("not enough memory: a sheet of %s needs %s, beside %s for %s at --batch %d in %s; %s has %s free: use a folder or .npz as --out, which keep no images in memory",
				images(j.n), plan.Size(output), plan.Size(need), j.params.Model, j.batch, j.dtype, dev.Name(), plan.Size(free))
		}
		if last {
			return failf("not enough memory: %s at --batch %d in %s need %s, %s has %s free",
				j.params.Model, j.batch, j.dtype, plan.Size(need), dev.Name(), plan.Size(free))
		}
		j.batch = (j.batch + 1) / 2
	}
}

// memory is what the job takes at most of this device's memory.
func (j *job) memory(of engine.Device, encode bool) (int64, error) {
	dev := plan.For(of)
	m, err := newGenerator(j.info, j.fp8)
	if err != nil {
		return 0, err
	}
	if err := load.Allocate(m.params, dev, j.dtype); err != nil {
		return 0, err
	}
	tok, params, err := j.tokenizer.make(encode)
	if err != nil {
		return 0, err
	}
	if err := load.Allocate(params, dev, j.dtype); err != nil {
		return 0, err
	}
	e, err := m.open(tok, dev, j.options())
	if err != nil {
		return 0, err
	}
	defer e.Close()
	est, err := e.Estimate(j.request())
	if err != nil {
		return 0, err
	}
	r := dev.Report()
	return max(r.Live+est.Memory, r.Peak), nil
}
