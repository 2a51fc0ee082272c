package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"margo/engine/dist"
)

// rankWait is how long ranks wait for each other at the start: loading weights over a
// network's file system takes ranks differently long.
const rankWait = 5 * time.Minute

// ranksFlag is --ranks of sample.
func ranksFlag() cli.Flag {
	return &cli.StringFlag{Name: "ranks", Category: "Machine", Value: "auto",
		Usage: "`WHO`|auto: share the images with the ranks that torchrun, MPI or srun started; off; or R/N@HOST:PORT: rank R of N, which meet rank 0 there"}
}

// readRanks is this process's place among the ranks; nil if it is alone. Several ranks
// write into a folder only: a sheet or an npz would have to be gathered.
func readRanks(c *cli.Context) (*dist.Place, error) {
	var p *dist.Place
	var err error
	switch v := c.String("ranks"); v {
	case "off":
		return nil, nil
	case "auto":
		if p, err = dist.FromEnv(os.Getenv); err != nil {
			return nil, usagef("%w (--ranks off samples in this process alone)", err)
		}
	default:
		if p, err = dist.ParsePlace(v); err != nil {
			return nil, usagef("--%w", err) // which begins with "ranks: "
		}
		if p.Size == 1 {
			p = nil
		}
	}
	return p, nil
}

// deviceOf is the device that a rank of this machine takes: of "cuda" and "emu" without
// a number the one with the rank's number on its machine, or the only one that the rank
// sees, for launchers that show each rank one of them. count is cuda.Count.
func deviceOf(name string, p *dist.Place, count func(kind string) (int, error)) string {
	if p == nil || name != "cuda" && name != "emu" {
		return name
	}
	if n, err := count(name); err != nil || n == 1 { // an error is said when the device is opened
		return name + ":0"
	}
	return fmt.Sprintf("%s:%d", name, p.Local)
}

// share takes the rank's images of the job, contiguous: an image depends on seed and
// index only, so the folder ends up with the bytes that one process writes. A rank
// without images has nothing to do but to say so.
func (j *job) share(p *dist.Place) {
	first, n := p.Share(j.n)
	j.first, j.n = j.first+first, n
	j.batch = min(j.batch, max(n, 1))
}

// agree meets the other ranks and makes sure that all were asked for the same images.
func agree(ctx context.Context, p *dist.Place, settings ...any) (*dist.Group, error) {
	text, err := json.Marshal(settings)
	if err != nil {
		return nil, failf("ranks: %w", err)
	}
	g, err := dist.Join(ctx, *p, rankWait)
	if err != nil {
		return nil, err
	}
	mine := sha256.Sum256(text)
	theirs := mine
	if err := g.BroadcastBytes(0, theirs[:]); err != nil {
		g.Close()
		return nil, err
	}
	if theirs != mine {
		g.Close()
		return nil, failf("rank %d was started with other flags or another model than rank 0: all ranks need the same", p.Rank)
	}
	// Whoever disagreed has left: the others hear of it here.
	if err := g.Barrier(); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}
