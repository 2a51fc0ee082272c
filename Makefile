# margo: `make` lists what there is. `make demo` and `make test` are all a
# newcomer needs: both install what they lack and are quick when nothing is to do.

SHELL := /bin/bash
GO    ?= go
BIN   := bin/margo
SRC   := $(shell find cmd cpu cuda engine bench -name '*.go' -o -name '*.[ch]' 2>/dev/null) kernels/margo_abi.h go.mod go.sum
DEMO  := demo.png
FUZZTIME ?= 60s

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: setup
setup: ## install what building lacks (C compiler, Go modules)
	@.ci/setup build

.PHONY: build
build: setup $(BIN) ## build bin/margo

$(BIN): $(SRC)
	$(GO) build -trimpath -ldflags "-s -w" -buildvcs=auto -o $@ ./cmd/margo

.PHONY: demo
demo: build ## sample a grid of clothes from the MAR that ships with margo
	$(BIN) sample --model models/fashion-mar.safetensors --classes 0,1,2,3,4,5,6,7,8,9 -n 40 --batch 40 --out $(DEMO)
	@echo "The picture is $(CURDIR)/$(DEMO): ten classes across, four samples each."

# ---- CUDA ----
# The toolkit that is there, or the pinned one that cuda-toolchain put into .cuda.
CUDA_VENV := .cuda
CUDA_WHEEL = $(firstword $(wildcard $(CURDIR)/$(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu13))
NVCC ?= $(or $(if $(CUDA_WHEEL),$(CUDA_WHEEL)/bin/nvcc),$(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
JOBS ?= $(shell nproc)

.PHONY: cuda-toolchain
cuda-toolchain: ## install the pinned CUDA compiler (134 MB) where there is no toolkit
	@.ci/setup cuda
	@kernels/toolchain.sh "$(CUDA_VENV)"

.PHONY: cuda
cuda: ## build bin/libmargo_cuda.so with nvcc (about 10 minutes on 2 cores)
	@.ci/setup cuda
	@test -n "$(NVCC)" || { echo "no nvcc: make cuda-toolchain installs one" >&2; exit 1; }
	@mkdir -p bin .build/cuda
	@cmake -S . -B .build/cuda -DNVCC="$(NVCC)" -DCUDA_ROOT="$(CUDA_WHEEL)" -DOUT="$(CURDIR)/bin" -DARCHES="$(ARCHES)" >/dev/null
	@cmake --build .build/cuda --target cuda -j $(JOBS)

.PHONY: gpu-tests
gpu-tests: cuda # bin/test/*_test: programs that check and time kernels
	@cmake --build .build/cuda --target cuda_tests -j $(JOBS)

.PHONY: gpu-check
gpu-check: build gpu-tests ## on a machine with a GPU: run every check and timing of it into gpu-report (about 10 minutes)
	@kernels/test/run.sh cuda:0 gpu-report

.PHONY: cuda-gate
cuda-gate: cuda ## check registers, spills and tensor-core instructions of what make cuda built
	@kernels/gate.sh "$(dir $(NVCC))cuobjdump" .build/cuda

.PHONY: abi-check
abi-check: ## compare our prototypes of cuBLASLt, NCCL and NVML with NVIDIA's headers and libraries (750 MB, pinned)
	@.ci/setup cuda
	@kernels/abi/check.sh "$(CURDIR)/.abi"

.PHONY: budget budget-static budget-check
budget: cuda ## write kernels/BUDGET.md: instructions of the main loops, occupancy, roofline estimate
	@kernels/budget.sh "$(dir $(NVCC))cuobjdump" .build/cuda
	@MARGO_UPDATE_BUDGET=1 $(GO) test -count=1 -run TestRooflineTable ./engine/sample
	@$(MAKE) --no-print-directory emu
	@MARGO_UPDATE_BUDGET=1 $(GO) test -count=1 -run TestOccupancyTable ./cuda
budget-static: cuda # only the part that comes from the compiler; the other is a test
	@CHECK=1 kernels/budget.sh "$(dir $(NVCC))cuobjdump" .build/cuda
budget-check: budget-static ## compare kernels/BUDGET.md with what the pinned compiler makes now
	@$(GO) test -count=1 -run TestRoofline ./engine/sample
	@$(MAKE) --no-print-directory emu
	@$(GO) test -count=1 -run TestOccupancyTable ./cuda

.PHONY: test
test: ## everything that must pass: format, vet, tests, race detector, sanitizers, arm64, CUDA kernels
	@.ci/setup test
	@.ci/test

.PHONY: test-short
test-short: ## unit tests only
	$(GO) test ./...

.PHONY: fuzz
fuzz: ## fuzz every parser for FUZZTIME (60s) each
	@.ci/fuzz $(FUZZTIME)

.PHONY: verify
verify: build ## replay every golden trace in f32 and bf16
	@.ci/verify

.PHONY: peers
peers: ## install the pinned PyTorch that `margo bench --against pytorch` runs
	@.ci/setup peers
	@bench/peers/setup.sh

REPS ?= 3

.PHONY: results
results: build ## measure MAR, AR and DiT side by side into docs/results (about 20 minutes; on a quiet machine)
	$(BIN) bench --model mar-base,mar-large,dit-xl/2,ar-raster-base --steps 50,100,250 --subset 8 --reps $(REPS) --interleave \
		--format json --out docs/results/comparison.json --plot docs/results/comparison.png
	$(BIN) bench --from docs/results/comparison.json --out docs/results/comparison.txt

.PHONY: goldens
goldens: peers ## make the golden files of diffusers, taming and LDM (pinned)
	@bench/goldens/setup.sh
	@PYTHONPATH=.goldens HF_HUB_OFFLINE=1 .peers/bin/python bench/goldens/make.py testdata/goldens

.PHONY: emu
emu: ## build bin/libmargo_emu.so: the CUDA kernels run and checked on the host
	@mkdir -p bin
	@$(MAKE) --no-print-directory -s -C kernels/emu OUT=$(CURDIR)/bin

.PHONY: emu-report
emu-report: ## write kernels/ACCESS.md: bank conflicts and unused sectors of every kernel that the table launches
	@kernels/emu/access.sh

.PHONY: emu-check emu-asan emu-tsan
emu-check: ## test ./cuda on the emulator with its checker of races and bounds (long)
	@.ci/sanitize check
emu-asan: ## the same with AddressSanitizer and UBSan
	@.ci/sanitize address
emu-tsan: ## the same with ThreadSanitizer
	@.ci/sanitize thread

.PHONY: clean
clean: ## remove what was built
	rm -rf bin .build gpu-report $(DEMO)
