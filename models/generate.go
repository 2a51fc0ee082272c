//go:build ignore

// Generate makes the files of this folder from the checkpoints that PyTorch
// wrote:
//
//	go run models/generate.go mar_fashion.pth kl4_fashion.ckpt
//
// It is kept as the record of how they came to be; equal inputs give equal
// bytes.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"margo/engine/checkpoint"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: go run models/generate.go mar_fashion.pth kl4_fashion.ckpt")
		os.Exit(2)
	}
	classes, err := json.Marshal([]string{"T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"})
	if err != nil {
		panic(err)
	}
	const scale = "0.7403369118397486" // recorded in mar_fashion.pth as latent_scale
	convert(os.Args[1], "models/fashion-mar.safetensors", map[string]string{
		"title": "MAR on Fashion-MNIST", "license": "MIT", "class_names": string(classes), "tokenizer": "fashion-kl.safetensors",
		"iters": "24", "head_steps": "100", "max_timestep": "950", "cfg": "2", "cfg_schedule": "linear", "temperature": "1",
	})
	convert(os.Args[2], "models/fashion-kl.safetensors", map[string]string{
		"title": "KL tokenizer on Fashion-MNIST", "license": "MIT", "latent_scale": scale,
	})
}

func convert(in, out string, meta map[string]string) {
	c, err := checkpoint.Convert(context.Background(), in, out, checkpoint.ConvertOptions{Metadata: meta})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%s: %d parameters of %s, latent scale %g\n", out, c.Params, c.State, c.Model.LatentScale)
}
