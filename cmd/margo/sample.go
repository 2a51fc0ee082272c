package main

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"margo/cuda"
	"margo/engine"
	"margo/engine/checkpoint"
	"margo/engine/diffusion"
	"margo/engine/imageio"
	"margo/engine/sample"
)

func sampleCommand() *cli.Command {
	return &cli.Command{
		Name:      "sample",
		Usage:     "make images with a MAR or a DiT",
		UsageText: "margo sample --model FILE [--classes LIST] [-n N] [--out OUT] [flags]",
		Description: `A MAR fills an image's tokens in random order, some at each of --iters iterations; a small diffusion network draws each token in --head-steps steps. More of both is slower and, up to a point, better. Settings that are not given come from the model's file, else they are the authors'.

A DiT denoises all tokens at once, in --steps steps of the --sampler. Its guidance covers three of the four latent channels, as the authors' code has it for the published numbers, or with --cfg-channels all every one, as diffusers has it: images differ.

Image i has the classes' item i mod their number, and its random numbers depend on --seed and i only: not on --batch, --threads or the other images. So --first-index continues a series, and on one device and dtype the same command gives the same bytes.

--out says what is written: a folder gets 00000.png and so on, NAME.png one sheet of all images with a column for each class, NAME.npz an array arr_0 of uint8 [N,H,W,3] as ADM's evaluator reads it. Files of the same name are replaced, others stay; every file appears complete or not at all. PNGs carry all parameters in their text chunk "parameters".

With --image and --mask a known image is completed: white parts of the mask are filled (a token is filled if any of its pixels is white), the rest is kept. Both are fitted to the model's size about their centre. The image passes through the tokenizer, so kept parts look alike but not bit for bit.

Started by torchrun, mpirun or srun, every rank makes its part of the images on its own --device and writes it into the folder, which then holds the same files as of one process. With --device cuda a rank takes the GPU of its number on its machine (LOCAL_RANK), or the only one that CUDA_VISIBLE_DEVICES shows it.

Ctrl-C stops between steps: whole images of a folder stay, unfinished files go. Press it again to stop at once.

Examples:
  margo sample --model models/fashion-mar.safetensors --classes 0-9 -n 40 --out grid.png
  margo sample --model mar-base.safetensors --tokenizer kl16.safetensors \
      --classes 207,360 -n 8 --iters 64 --cfg 2.9 --dtype bf16 --out dogs
  margo sample --model DiT-XL-2-256x256.pt --tokenizer sd-vae-ft-mse.safetensors \
      --classes 207 --steps 50 --sampler ddim --cfg 4 --out dog.png
  margo sample --model mar-base.safetensors --image dog.png --mask hole.png \
      --classes 207 -n 4 --out filled.png`,
		Flags: slices.Concat([]cli.Flag{
			&cli.StringFlag{Name: "model", Aliases: []string{"m"}, Category: "Model", Usage: "`FILE`|the weights of a MAR or DiT: safetensors, .pth, .pt or .ckpt (needed)"},
			&cli.StringFlag{Name: "tokenizer", Aliases: []string{"t"}, Category: "Model", DefaultText: "the file that the model names, beside it", Usage: "`FILE`|the tokenizer's weights: KL, or VQ, whose latents before quantisation are the tokens"},
			latentScaleFlag("Model", "the model's, else the tokenizer's"),
		}, shapeFlags(), []cli.Flag{
			&cli.StringFlag{Name: "classes", Category: "Images", DefaultText: "all in turn", Usage: "`LIST`|class ids, ranges or names that the model knows, repeated in turn: 207,360 or 0-9 or sneaker,bag"},
			&cli.BoolFlag{Name: "uncond", Category: "Images", Usage: "no class: sample with the dummy class (no guidance then)"},
			&cli.IntFlag{Name: "n", Category: "Images", DefaultText: "one for each of --classes, else 8", Usage: "`N`|images to make"},
			&cli.Uint64Flag{Name: "seed", Category: "Images", Usage: "`SEED`|of all random numbers, 0 to 2^64-1", Value: 0, DefaultText: "0"},
			&cli.IntFlag{Name: "first-index", Category: "Images", DefaultText: "0", Usage: "`I`|index of the first image, to continue a series"},
			&cli.StringFlag{Name: "image", Category: "Images", Usage: "`FILE`|PNG or JPEG to complete (with --mask)"},
			&cli.StringFlag{Name: "mask", Category: "Images", Usage: "`FILE`|PNG or JPEG, white where --image is to be filled"},

			&cli.IntFlag{Name: "iters", Category: "Sampling", DefaultText: "the model's, else 64", Usage: "`N`|autoregressive iterations of a MAR, at least 1; the paper uses 64 to 256"},
			&cli.IntFlag{Name: "head-steps", Category: "Sampling", DefaultText: "the model's, else 100", Usage: "`N`|diffusion steps for each token of a MAR, 2 to 1000"},
			&cli.IntFlag{Name: "max-timestep", Category: "Sampling", DefaultText: "the model's, else 999", Usage: "`T`|largest diffusion timestep, 1 to 999; 950 cures the noise that young checkpoints give"},
			&cli.StringFlag{Name: "steps", Category: "Sampling", DefaultText: "the model's, else 250", Usage: "`SPEC`|reverse steps of a DiT, 2 to 1000: a count, counts of equal sections of the timesteps (60,40), or ddimN"},
			&cli.StringFlag{Name: "sampler", Category: "Sampling", DefaultText: "the model's, else ddpm", Usage: "`NAME`|of a DiT: ddpm (learned variance) or ddim"},
			&cli.Float64Flag{Name: "eta", Category: "Sampling", DefaultText: "the model's, else 0", Usage: "`ETA`|noise of ddim: 0 (none) to 1 (as much as ddpm's)"},
			&cli.StringFlag{Name: "cfg-channels", Category: "Sampling", DefaultText: "the model's, else 3", Usage: "`WHICH`|latent channels that a DiT's guidance covers: 3, as the authors', or all, as diffusers'"},
			&cli.Float64Flag{Name: "cfg", Category: "Sampling", DefaultText: "the model's, else 1; a DiT's 4", Usage: "`S`|classifier-free guidance scale; 1 is off and twice as fast, 2 to 4 sharpens"},
			&cli.StringFlag{Name: "cfg-schedule", Category: "Sampling", DefaultText: "the model's, else linear", Usage: "`KIND`|linear: guidance grows from 1 to --cfg as tokens appear; constant: always --cfg"},
			&cli.Float64Flag{Name: "temperature", Category: "Sampling", DefaultText: "the model's, else 1", Usage: "`T`|factor on the noise of the head's steps; below 1 is less varied"},
			&cli.StringFlag{Name: "order", Category: "Sampling", DefaultText: "what the model was trained on", Usage: "`ORDER`|of the tokens: random, raster (row by row), or confidence (categorical head, bidirectional: the surest codes first)"},
			&cli.IntFlag{Name: "top-k", Category: "Sampling", DefaultText: "all", Usage: "`K`|categorical head: draw from the K likeliest codes"},
			&cli.Float64Flag{Name: "top-p", Category: "Sampling", Value: 1, Usage: "`P`|categorical head: draw from the likeliest codes that make up probability P"},
			&cli.StringFlag{Name: "code-sampler", Category: "Sampling", Value: "gumbel", Usage: "`KIND`|categorical head: draw codes by gumbel (Gumbel-max) or inverse (transform)"},
			&cli.Float64Flag{Name: "choice-temperature", Category: "Sampling", Value: 4.5, Usage: "`T`|of the noise in --order confidence; it falls to 0 with the iterations"},
		}, tileFlags(), []cli.Flag{
			&cli.IntFlag{Name: "batch", Category: "Machine", Value: 8, Usage: "`N`|images at a time; more is faster until memory ends"},
			deviceFlag(),
			ranksFlag(),
			&cli.StringFlag{Name: "dtype", Category: "Machine", Value: "f32", Usage: "`DTYPE`|compute in f32, or in bf16: faster where the CPU has it, half the memory, small differences"},
			headWeightsFlag(),
			threadsFlag(),

			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Category: "Output", Value: "samples", Usage: "`OUT`|what to write: a folder, NAME.png or NAME.npz"},
			&cli.StringFlag{Name: "progress", Category: "Output", Value: "auto", Usage: "`MODE`|bar, log (a line every 10 s), off, or auto: a bar on a terminal, else lines"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Category: "Output", Usage: "print warnings and errors only"},
			jsonFlag(),
		}),
		Action: runSample,
	}
}

// job is a sample command whose flags were found possible.
type job struct {
	settings  checkpoint.Sampling
	labels    []int // -1: unconditional
	n, first  int
	batch     int
	seed      uint64
	scale     float64 // --latent-scale, 0 if it was not given
	tiles     tiling  // of the tokenizer
	dtype     engine.DType
	fp8       bool // weights of the head
	draw      codeDraw
	info      *checkpoint.Model
	tokenizer *tokenizerFile
	params    imageParams // of every image
}

// codeDraw is the order of tokens and how codes are drawn.
type codeDraw struct {
	order, sampler string
	topK           int
	topP, choice   float64
}

// imageParams is what a PNG says about its making.
type imageParams struct {
	Software  string `json:"software"`
	Model     string `json:"model"`
	Tokenizer string `json:"tokenizer,omitempty"`
	checkpoint.Sampling
	Order       string   `json:"order,omitempty"`
	Choice      *float64 `json:"choice_temperature,omitempty"` // of confidence order
	CodeSampler string   `json:"code_sampler,omitempty"`
	TopK        int      `json:"top_k,omitempty"`
	TopP        float64  `json:"top_p,omitempty"`
	LatentScale float64  `json:"latent_scale"`
	Tile        int      `json:"tile,omitempty"` // of the tokenizer, in pixels
	Overlap     int      `json:"overlap,omitempty"`
	Seed        uint64   `json:"seed"`
	Device      string   `json:"device"`
	DType       string   `json:"dtype"`
	HeadWeights string   `json:"head_weights,omitempty"`
	Image       string   `json:"image,omitempty"`
	Mask        string   `json:"mask,omitempty"`

	// One image.
	Index     *int   `json:"index,omitempty"`
	Class     *int   `json:"class,omitempty"` // -1: unconditional
	ClassName string `json:"class_name,omitempty"`

	// A sheet.
	FirstIndex *int     `json:"first_index,omitempty"`
	Images     int      `json:"images,omitempty"`
	Columns    int      `json:"columns,omitempty"`
	Classes    []int    `json:"classes,omitempty"`
	ClassNames []string `json:"class_names,omitempty"`
}

// result is what sample prints with --json.
type result struct {
	Files       []string    `json:"files"`
	Images      int         `json:"images"`
	Seconds     float64     `json:"seconds"`      // of sampling and decoding
	LoadSeconds float64     `json:"load_seconds"` // of reading and packing weights
	Rate        float64     `json:"images_per_second"`
	Threads     int         `json:"threads"`
	Parameters  imageParams `json:"parameters"`
}

func runSample(c *cli.Context) error {
	start := time.Now()
	log := logger(c)
	if c.Bool("quiet") {
		log.SetLevel(min(log.GetLevel(), logrus.WarnLevel))
	}
	bar, err := sampleProgress(c, log)
	if err != nil {
		return err
	}
	// What the flags alone decide, then what files decide, then the work.
	j, err := readSampleFlags(c)
	if err != nil {
		return err
	}
	place, err := readRanks(c)
	if err != nil {
		return err
	}
	out, err := openOutput(c.String("out"))
	if err != nil {
		return err
	}
	defer out.abort()
	if place != nil && out.kind != "dir" {
		return usagef("--out: rank %d of %d (%s) writes its images into a folder; sheets and npz files are for one rank", place.Rank, place.Size, place.From)
	}
	shape, open, err := shapeOptions(c)
	if err != nil {
		return err
	}
	file, info, err := openModel(c.String("model"), shape, open)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := j.resolve(c, info); err != nil {
		return err
	}
	if j.tokenizer, err = openScaled(c.String("tokenizer"), c.String("model"), info, j.scale, log); err != nil {
		return err
	}
	defer j.tokenizer.close()
	j.tokenizer.tiling = j.tiles
	known, err := readKnownImage(c, info.MAR) // nil for a DiT, which has none
	if err != nil {
		return err
	}
	dev, err := openDevice(deviceOf(c.String("device"), place, cuda.Count), c.Int("threads"))
	if err != nil {
		return err
	}
	defer dev.Close()
	j.fillParams(c, dev)
	if place != nil {
		// The device's name may differ: each rank has its own.
		same := j.params
		same.Device = ""
		ranks, err := agree(c.Context, place, same, j.labels, j.n, j.first)
		if err != nil {
			return err
		}
		defer ranks.Close()
		out.keepFolders()
		j.share(place)
		log.Infof("rank %d of %d (%s): %s from index %d", place.Rank, place.Size, place.From, images(j.n), j.first)
		if j.n == 0 {
			if c.Bool("json") {
				return printJSON(c.App.Writer, result{Files: []string{}, LoadSeconds: seconds(time.Since(start)), Threads: dev.Info().Threads, Parameters: j.params})
			}
			return nil
		}
	}

	if err := j.checkMemory(c.IsSet("batch"), dev, known != nil, out.memory(j), log); err != nil {
		return err
	}
	if note := fp8Note(dev.Info()); j.fp8 && note != "" {
		log.Warn(note)
	}
	model, err := loadModel(c.Context, file, info, dev, j.dtype, j.fp8)
	if err != nil {
		return err
	}
	tok, err := j.tokenizer.load(c.Context, dev, j.dtype, known != nil)
	if err != nil {
		return err
	}
	side, _ := info.Latents()
	if note := tileNote(tok, side, side); note != "" {
		log.Info(note)
	}
	request := j.request()
	if known != nil {
		if request.Known, err = known.encode(c.Context, dev, tok, info.MAR, j.dtype); err != nil {
			return err
		}
	}
	eng, err := model.open(tok, dev, j.options())
	if err != nil {
		return err
	}
	defer eng.Close()
	if err := c.Context.Err(); err != nil {
		return err
	}
	loaded := time.Since(start)
	log.Debugf("loaded in %s", duration(loaded))

	if err := out.begin(j); err != nil {
		return err
	}
	start = time.Now()
	warned := 0
	err = eng.Run(c.Context, request, func(p sample.Progress) {
		bar.update(time.Now(), state{p.Done, p.Total, p.Elapsed, p.Left, p.Rate})
	}, func(img sample.Image) error {
		if img.Warning != "" {
			if warned++; warned == 1 {
				log.Warnf("image %d: %s", img.Index, img.Warning)
			}
		}
		rgb, finite := imageio.FromFloat(img.W, img.H, img.Pixels)
		if !finite {
			cure := ""
			if j.settings.MaxTimestep > 950 { // 0 of a DiT
				cure = ", or --max-timestep is too large for them; try --max-timestep 950"
			}
			return failf("image %d is not finite (NaN or infinite pixels): the weights are broken%s", img.Index, cure)
		}
		return out.add(img.Index, img.Class, rgb)
	})
	bar.finish()
	if warned > 1 {
		log.Warnf("so it is with %d of the images", warned)
	}
	if err != nil {
		out.abort()
		if left := out.written(); len(left) > 0 && exitCode(err) == exitInterrupted {
			log.Warnf("%d of %d images are complete in %s", len(left), j.n, c.String("out"))
		}
		return err
	}
	files, err := out.finish()
	if err != nil {
		return err
	}
	took := time.Since(start)
	r := result{Files: files, Images: j.n, Seconds: seconds(took), LoadSeconds: seconds(loaded),
		Rate: math.Round(1000*float64(j.n)/took.Seconds()) / 1000, Threads: dev.Info().Threads, Parameters: out.describe(j)}
	switch {
	case c.Bool("json"):
		return printJSON(c.App.Writer, r)
	case !c.Bool("quiet"):
		fmt.Fprintf(c.App.Writer, "%s: %s in %.3g s (%s)\n", c.String("out"), images(j.n), took.Seconds(), rate(float64(j.n)/took.Seconds(), "images"))
		names := j.classNames()
		if cols := out.columns(j); len(names) > 1 && cols > 0 && cols%len(names) == 0 {
			again := ""
			if cols > len(names) {
				again = ", and again"
			}
			fmt.Fprintf(c.App.Writer, "columns: %s%s\n", oneLine(strings.Join(names, ", ")), again)
		}
	}
	return nil
}

func images(n int) string {
	if n == 1 {
		return "1 image"
	}
	return fmt.Sprintf("%d images", n)
}

func sampleProgress(c *cli.Context, log *logrus.Logger) (*progress, error) {
	mode := c.String("progress")
	if c.Bool("quiet") {
		mode = "off"
	}
	return newProgress(mode, "images", c.App.ErrWriter.(*console), log)
}

// readSampleFlags checks all that can be said without a file.
func readSampleFlags(c *cli.Context) (*job, error) {
	if c.NArg() > 0 {
		return nil, usagef("sample takes no arguments, only flags: what is %q?", c.Args().First())
	}
	if c.String("model") == "" {
		return nil, usagef("--model FILE is needed: the weights to sample from")
	}
	for _, f := range []struct {
		name      string
		low, high int
	}{
		{"n", 1, math.MaxInt32}, {"first-index", 0, math.MaxInt32}, {"iters", 1, 1 << 20}, {"head-steps", 2, 1000},
		{"batch", 1, 1 << 16}, {"threads", 1, 4096},
	} {
		if err := inRange(c, f.name, f.low, f.high); err != nil {
			return nil, err
		}
	}
	if err := checkSampling(c); err != nil {
		return nil, err
	}
	if v := c.Float64("eta"); !(v >= 0 && v <= 1) {
		return nil, usagef("--eta is %g, it must be between 0 and 1", v)
	}
	if _, err := diffusion.DiT(c.String("steps")); c.IsSet("steps") && err != nil {
		return nil, usagef("--steps: %w", err)
	}
	for name, of := range map[string][]string{"order": {sample.RandomOrder, sample.RasterOrder, sample.ConfidenceOrder}, "code-sampler": {sample.Gumbel, sample.Inverse}} {
		if c.IsSet(name) {
			if err := oneOf(c, name, of...); err != nil {
				return nil, err
			}
		}
	}
	if p := c.Float64("top-p"); !(p > 0 && p <= 1) {
		return nil, usagef("--top-p is %g, it must be above 0 and at most 1", p)
	}
	if c.Int("top-k") < 0 {
		return nil, usagef("--top-k is %d, it must be 0 (all) or more", c.Int("top-k"))
	}
	if t := c.Float64("choice-temperature"); !(t >= 0 && t <= 1e4) {
		return nil, usagef("--choice-temperature is %g, it must be between 0 and 10000", t)
	}
	if c.Bool("uncond") && c.IsSet("classes") {
		return nil, usagef("--uncond samples without a class: leave out --classes")
	}
	if c.Bool("uncond") && c.IsSet("cfg") && c.Float64("cfg") != 1 {
		return nil, usagef("--uncond has nothing to guide towards: leave out --cfg")
	}
	if c.IsSet("image") != c.IsSet("mask") {
		return nil, usagef("--image and --mask go together: an image, and white where it is to be filled")
	}
	j := &job{n: c.Int("n"), first: c.Int("first-index"), batch: c.Int("batch"), seed: c.Uint64("seed")}
	var err error
	if j.scale, err = givenScale(c); err != nil {
		return nil, err
	}
	if j.tiles, err = readTiling(c); err != nil {
		return nil, err
	}
	if j.dtype, err = engine.ParseDType(c.String("dtype")); err != nil {
		return nil, usagef("--dtype: %q is not a dtype; use f32 or bf16", c.String("dtype"))
	}
	if j.fp8, err = headFP8(c, j.dtype); err != nil {
		return nil, err
	}
	if d := c.String("device"); d != "cpu" && d != "ref" && !isCUDA(d) {
		_, err := openDevice(d, 0)
		return nil, err
	}
	return j, nil
}

// resolveDraw takes the order of tokens and how codes are drawn; m is nil for a DiT.
func (j *job) resolveDraw(c *cli.Context, m *checkpoint.MARConfig) error {
	if m == nil {
		return nil
	}
	j.draw = codeDraw{order: c.String("order"), choice: c.Float64("choice-temperature")}
	if c.IsSet("choice-temperature") && j.draw.order != sample.ConfidenceOrder {
		return usagef("--choice-temperature is for --order %s", sample.ConfidenceOrder)
	}
	if c.IsSet("latent-scale") && m.Discrete() {
		return usagef("--latent-scale: the tokens of this model are codes, which have none")
	}
	for _, name := range []string{"head-steps", "max-timestep"} {
		if c.IsSet(name) && m.HeadKind() != checkpoint.DiffusionHead {
			return usagef("--%s is of the diffusion head, and this model has the %s head", name, m.HeadKind())
		}
	}
	if m.Discrete() {
		j.draw.sampler, j.draw.topK, j.draw.topP = c.String("code-sampler"), c.Int("top-k"), c.Float64("top-p")
		return nil
	}
	for _, name := range []string{"top-k", "top-p", "code-sampler"} {
		if c.IsSet(name) {
			return usagef("--%s chooses among codes, and this model has the %s head", name, m.HeadKind())
		}
	}
	return nil
}

// resolve merges the flags into the model's settings and finds the classes.
func (j *job) resolve(c *cli.Context, info *checkpoint.Model) error {
	j.info, j.settings = info, info.Sampling
	s := &j.settings
	if err := refuseOthers(c, info.Kind); err != nil {
		return err
	}
	if err := j.resolveDraw(c, info.MAR); err != nil {
		return err
	}
	setSampling(c, s)
	if c.IsSet("steps") {
		s.Steps = c.String("steps")
	}
	if c.IsSet("eta") {
		s.Eta = c.Float64("eta")
	} else if s.Sampler != "ddim" {
		s.Eta = 0 // the file's, for its own sampler
	}
	if s.Eta != 0 && s.Sampler != "ddim" {
		return usagef("--eta is for --sampler ddim; ddpm has a learned variance")
	}
	for name, p := range map[string]*int{"iters": &s.Iters, "head-steps": &s.HeadSteps} {
		if c.IsSet(name) {
			*p = c.Int(name)
		}
	}
	if err := stepsFit(s.HeadSteps, s.MaxTimestep); err != nil {
		return err
	}
	switch {
	case c.Bool("uncond"):
		j.labels = []int{-1}
		s.CFG = 1
	case c.IsSet("classes"):
		var err error
		if j.labels, err = parseClasses(c.String("classes"), info.ClassNames, info.Classes()); err != nil {
			return err
		}
	default:
		for id := range info.Classes() {
			j.labels = append(j.labels, id)
		}
	}
	if j.n == 0 {
		if j.n = len(j.labels); !c.IsSet("classes") {
			j.n = 8
		}
	}
	j.batch = min(j.batch, j.n)
	return nil
}

func (j *job) fillParams(c *cli.Context, dev engine.Device) {
	j.params = imageParams{Software: "margo " + c.App.Version, Model: filepath.Base(c.String("model")), Sampling: j.settings,
		LatentScale: j.tokenizer.scale, Seed: j.seed, Device: dev.Name(), DType: j.dtype.String()}
	if c.IsSet("image") {
		j.params.Image, j.params.Mask = filepath.Base(c.String("image")), filepath.Base(c.String("mask"))
	}
	j.params.Order, j.params.CodeSampler = j.draw.order, j.draw.sampler
	if j.draw.order == sample.ConfidenceOrder {
		j.params.Choice = &j.draw.choice
	}
	if j.tiles.tile > 0 {
		j.params.Tile, j.params.Overlap = j.tiles.tile, j.tiles.shared(j.info.Stride())
	}
	if j.fp8 {
		j.params.HeadWeights = "fp8"
	}
	if j.draw.sampler != "" {
		j.params.TopK, j.params.TopP = j.draw.topK, j.draw.topP
	}
	if j.tokenizer.path != "" {
		j.params.Tokenizer = filepath.Base(j.tokenizer.path)
	}
}

func (j *job) request() sample.Request {
	s := j.settings
	return sample.Request{Labels: j.labels, N: j.n, FirstIndex: j.first, Batch: j.batch, Iters: s.Iters, HeadSteps: s.HeadSteps,
		MaxTimestep: s.MaxTimestep, CFG: s.CFG, CFGSchedule: s.CFGSchedule, Temperature: s.Temperature, Seed: j.seed,
		Steps: s.Steps, Sampler: s.Sampler, Eta: s.Eta, CFGChannels: s.CFGChannels,
		Order: j.draw.order, TopK: j.draw.topK, TopP: j.draw.topP, CodeSampler: j.draw.sampler, ChoiceTemperature: j.draw.choice}
}

func (j *job) options() sample.Options {
	return sample.Options{Compute: j.dtype, LatentScale: j.tokenizer.scale}
}

// imageSize is the side of an image in pixels.
func (j *job) imageSize() int { return j.info.PixelSize() }

// refuseOthers refuses flags that are for the other kind of model.
func refuseOthers(c *cli.Context, kind string) error {
	other, what := []string{"steps", "sampler", "eta", "cfg-channels"}, "a DiT, and this is a MAR"
	if kind == checkpoint.KindDiT {
		other, what = []string{"iters", "head-steps", "max-timestep", "cfg-schedule", "image", "mask", "patch-size", "head-weights",
			"order", "top-k", "top-p", "code-sampler", "choice-temperature"}, "a MAR, and this is a DiT"
	}
	for _, name := range other {
		if c.IsSet(name) {
			return usagef("%s is for %s", dashed(name), what)
		}
	}
	return nil
}

// period is the number of labels that the images go through.
func (j *job) period() int { return min(len(j.labels), j.n) }

func (j *job) classNames() []string {
	var names []string
	for i := range j.period() {
		names = append(names, className(j.info.ClassNames, j.label(j.first+i)))
	}
	return names
}

// label is the class of the image with the given index.
func (j *job) label(index int) int { return j.labels[index%len(j.labels)] }
