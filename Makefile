# `make demo` and `make test` need Python 3.11+ and nothing else: everything goes into a virtual environment here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

EXAMPLES ?= 1000

.PHONY: demo test test-long fuzz test-llmcompressor test-clients test-versions test-isa check docs bench clean

demo: $(VENV)/.installed
	$(BIN)/spinquant demo demo --force

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Tests that take longer than a test of the suite may: compiled and exported models.
test-long: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m long

# The fuzzer of tests/laws/test_fuzzing.py, with new mutations of model folders: an hour on two cores. EXAMPLES=100 takes
# minutes. A failure prints what was mutated, and how.
fuzz: $(VENV)/.installed
	SPINQUANT_FUZZ_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/laws/test_fuzzing.py

# SpinQuantModifier beside llm-compressor's own modifiers, in an environment with the versions that it pins.
test-llmcompressor: $(VENV)-llmcompressor/.installed
	HF_HUB_OFFLINE=1 $(VENV)-llmcompressor/bin/python -m pytest tests/integrations/test_llmcompressor.py

$(VENV)-llmcompressor/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 pytest "llmcompressor>=0.14,<0.15"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation as a site in site/, in an environment of its own; a broken link or anchor is an error.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict --clean

$(VENV)-docs/.installed: requirements-docs.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.lock
	touch $@

# Against llm-compressor, which gets an environment of its own (it pins other versions).
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/hadamard_transform.py
	$(BIN)/python benchmarks/evaluate_overhead.py
	$(BIN)/python benchmarks/generate_overhead.py
	$(BIN)/python benchmarks/fuse.py

# vLLM (3.4 GB), transformers with compressed-tensors, and CTranslate2, each in an environment of its own under .clients/.
# CLIENTS="vllm ctranslate2" runs some of them.
test-clients: $(VENV)/.installed
	$(BIN)/python clients/run.py $(CLIENTS)

# The contracts with libraries and the laws of online parts, under the oldest supported releases of transformers and of the
# other libraries, the locked ones and the newest, each in an environment of its own under .versions/. VERSIONS="newest"
# runs one of them.
test-versions: $(VENV)/.installed
	$(BIN)/python versions/run.py $(VERSIONS)

# The numerical laws with the kernels of lesser processors: of torch, oneDNN and MKL without AVX, then with AVX2 alone.
LAWS := tests/compute tests/rotations tests/quantization tests/streaming/test_rounding_noise.py \
	tests/evaluation/test_equivalence.py tests/laws/test_families.py -k "(not test_families or -all) and not test_peak_memory"
test-isa: $(VENV)/.installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n auto --dist worksteal $(LAWS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n auto --dist worksteal $(LAWS)

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-llmcompressor $(VENV)-docs demo site
