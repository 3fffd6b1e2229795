# Everything runs in .venv, which scripts/bootstrap makes and keeps up to date.
.PHONY: help demo test bench sanitize lint format typecheck clean setup
ARGS ?=

help:
	@echo "make demo    train local, FedAvg and FLEx on a real model and print what they cost and reach"
	@echo "make test    the test suite"
	@echo "make bench   the layer against transformers on this machine (takes about half an hour)"
	@echo "make sanitize   the CPU kernels' tests under the address, undefined and thread sanitizers of g++"
	@echo "make lint    ruff and mypy;  make format  rewrites the files"
	@echo "ARGS=\"...\"   is passed on:  make demo ARGS=\"--rounds 10\",  make test ARGS=\"-k routing\""

setup:
	@scripts/bootstrap

demo: setup
	.venv/bin/flex-moe demo $(ARGS)

test: setup
	.venv/bin/python -m pytest $(ARGS)

bench: setup
	.venv/bin/flex-moe bench $(ARGS)

sanitize: setup
	scripts/sanitize $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build *.egg-info flex_kernels/*.so
