#!/usr/bin/env bash
# Makes .venv on first use, installs the pinned packages, and runs rlhf-kit in it. See ./launch.sh --help.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv

usage() {
  cat <<EOF
Usage:
  ./launch.sh RECIPE.yaml [key=value ...]   train (the same as: rlhf-kit train RECIPE.yaml ...)
  ./launch.sh COMMAND [argument ...]        another command of rlhf-kit, such as check or report
  ./launch.sh test [argument ...]           run the tests with pytest
  ./launch.sh lint                          run ruff and pyright
  ./launch.sh --config NAME [--num_processes N] RECIPE.yaml [key=value ...]
                                            launch through accelerate with accelerate_configs/NAME.yaml
                                            or with a file of your own

Configurations: $(configs)
They start one process per GPU, or two processes on the CPU where there is none; --num_processes overrides
that. Without --config there is one process, on the first GPU if there is one.

multi_node_* run on several machines: start the same command on each, with
  --num_machines N           how many there are                  (or NNODES)
  --machine_rank K           which this one is, counted from 0   (or NODE_RANK)
  --main_process_ip ADDRESS  where machine 0 can be reached      (or MASTER_ADDR)
  --main_process_port PORT   a free port there                   (or MASTER_PORT; 29500)
--num_processes is then the number on all machines together. The machines need the same recipe and a common folder
for the run.

Environment: PYTHON names the interpreter that makes .venv (3.11 or newer). pip's own variables apply, so that
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can offer another build of torch, such as the CPU's.
EOF
}

say() { printf 'launch.sh: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 2
}

configs() {
  local file names=()
  for file in "$root"/accelerate_configs/*.yaml; do names+=("$(basename "$file" .yaml)"); done
  printf '%s' "${names[*]}"
}

config_file() {
  case $1 in
    */* | *.yaml | *.yml) printf '%s' "$1" ;;
    *) printf '%s' "$root/accelerate_configs/$1.yaml" ;;
  esac
}

# --- Setting up ------------------------------------------------------------------------------------------

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local python pythons=(python3 python3.13 python3.12 python3.11)
  if [ -n "${PYTHON:-}" ]; then pythons=("$PYTHON"); fi
  for python in "${pythons[@]}"; do
    if is_supported "$python"; then
      echo "$python"
      return
    fi
  done
  fail "found no Python 3.11 or newer (tried: ${pythons[*]}); install one, or name it:" \
    "PYTHON=/path/to/python3.11 ./launch.sh ..."
}

# What the installed packages follow from. A stamp in .venv holds it, so that a second start needs no pip.
wanted() { cat "$root/pyproject.toml" "$root/constraints.txt" "$root/tests/no-deps.txt" | cksum; }

is_installed() {
  [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$(wanted)" ]
}

# Two launches must not install at once. The lock is let go when the (sub)shell that took it ends.
lock() {
  if command -v flock >/dev/null; then
    exec 9>"$venv/.lock"
    flock 9
  else
    until mkdir "$venv/.lock.d" 2>/dev/null; do
      say "waiting for another launch.sh to finish installing (if there is none: rmdir $venv/.lock.d)"
      sleep 5
    done
    trap 'rmdir "$venv/.lock.d"' EXIT
  fi
}

install() (
  group=$1
  mkdir -p "$venv"
  lock
  if is_installed "$group"; then exit; fi # another launch has done it meanwhile

  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  is_supported "$venv/bin/python" ||
    fail "$venv has $("$venv/bin/python" --version), but 3.11 or newer is needed; remove it and start again"

  say "installing the packages of constraints.txt into $venv (minutes the first time)"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
  if [ ! -t 2 ]; then pip+=(--quiet); fi
  wanted=$(wanted)
  if [ "$group" = test ]; then
    "${pip[@]}" --constraint "$root/constraints.txt" --editable "$root[dev]" >&2
    "${pip[@]}" --no-deps --requirement "$root/tests/no-deps.txt" >&2
    echo "$wanted" >"$venv/.installed-test"
  else
    "${pip[@]}" --constraint "$root/constraints.txt" --editable "$root" >&2
  fi
  echo "$wanted" >"$venv/.installed-run" # last: an interrupted installation is taken up again
)

enter() {
  if ! is_installed "$1"; then install "$1"; fi
  export PATH="$venv/bin:$PATH" # DeepSpeed compiles its operators with the ninja that is installed there
  # ... and such builds fit one version of torch, so they stay with it.
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"
  drop_stale_locks
}

# torch builds an operator while it holds a lock file open. A build that is killed leaves the file, and every
# later run would wait for it without end and without a word.
drop_stale_locks() {
  local lock
  for lock in "$TORCH_EXTENSIONS_DIR"/*/lock; do
    if [ -e "$lock" ] && [ -d /proc/self/fd ] && ! is_open "$lock"; then rm -f "$lock"; fi
  done
}

is_open() { [ -n "$(find -L /proc/[0-9]*/fd -maxdepth 1 -samefile "$1" 2>/dev/null)" ]; }

# --- Running ---------------------------------------------------------------------------------------------

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true # an empty list and -1 both mean none
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}

count_cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# glibc gives large blocks back to the system at once and fetches them anew, page by page. With a language model's
# logits on a CPU that takes up to two thirds of the time.
keep_large_blocks() {
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
}

run_single() {
  if [ "$(count_gpus)" -eq 0 ]; then keep_large_blocks; fi
  # With more than one GPU in sight, transformers would wrap the model in nn.DataParallel, which TRL does not
  # support.
  if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$(count_gpus)" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=0; fi
  exec "$venv/bin/python" -m rlhf_kit "$@"
}

# Chooses devices for a run on the CPU. accelerate starts processes for a GPU configuration on any machine, but
# what they then become depends on the environment: without ACCELERATE_USE_CPU, data parallel is two unconnected
# processes; with it, DeepSpeed and FSDP silently turn into plain data parallel.
use_cpu() {
  keep_large_blocks
  export CUDA_VISIBLE_DEVICES=""
  case $1 in
    *fsdp*) fail "--config $1 needs a GPU and none was found; use cpu_ddp, zero2 or zero3" ;;
    *zero* | *deepspeed*)
      unset ACCELERATE_USE_CPU
      export DS_ACCELERATOR=cpu
      ;;
    *) export ACCELERATE_USE_CPU=true ;;
  esac
}

# What tells the machines of a multi_node_* run about each other, from options or else from the environment.
node_options() {
  num_machines=${num_machines:-${NNODES:-}}
  machine_rank=${machine_rank:-${NODE_RANK:-}}
  main_process_ip=${main_process_ip:-${MASTER_ADDR:-}}
  main_process_port=${main_process_port:-${MASTER_PORT:-29500}}
  [[ $num_machines =~ ^[1-9][0-9]*$ ]] ||
    fail "--config $1 needs --num_machines (or NNODES), a positive number, not '$num_machines'"
  [[ $machine_rank =~ ^[0-9]+$ ]] && [ "$machine_rank" -lt "$num_machines" ] ||
    fail "--config $1 needs --machine_rank (or NODE_RANK), from 0 to $((num_machines - 1)), not '$machine_rank'"
  [ -n "$main_process_ip" ] || fail "--config $1 needs --main_process_ip (or MASTER_ADDR): the address of machine 0"
}

run_accelerate() {
  local config=$1 processes=$2 gpus nodes=() here
  shift 2
  gpus=$(count_gpus)
  case $config in cpu_*) gpus=0 ;; esac
  case $config in
    */* | *.yaml | *.yml) ;; # the user's own file says how many processes it wants
    single_gpu) processes=1 ;;
    multi_node_*)
      processes=${processes:-$((num_machines * (gpus > 0 ? gpus : 2)))}
      [ $((processes % num_machines)) -eq 0 ] ||
        fail "--num_processes $processes is no multiple of the $num_machines machines"
      nodes=(--num_machines "$num_machines" --machine_rank "$machine_rank"
        --main_process_ip "$main_process_ip" --main_process_port "$main_process_port")
      ;;
    *) processes=${processes:-$((gpus > 0 ? gpus : 2))} ;;
  esac
  if [ "$gpus" -eq 0 ]; then use_cpu "$(basename "$config")"; fi

  here=$((${processes:-$((gpus > 0 ? gpus : 2))} / ${num_machines:-1}))
  local threads=$(($(count_cores) / here))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  exec "$venv/bin/python" -m accelerate.commands.launch --config_file "$(config_file "$config")" \
    ${processes:+--num_processes "$processes"} ${nodes[@]+"${nodes[@]}"} -m rlhf_kit "$@"
}

lint() {
  local status=0
  ruff check . || status=1
  ruff format --check . || status=1
  # Without the variable, pyright asks the network whether there is a newer version.
  PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright || status=1
  return $status
}

main() {
  local config="" processes="" num_machines="" machine_rank="" main_process_ip="" main_process_port=""
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --config)
        config=${2:-}
        [ -n "$config" ] || fail "--config needs a name; choose from: $(configs)"
        shift 2
        ;;
      --num_processes | --num-processes)
        processes=${2:-}
        [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--num_processes needs a positive number, not '$processes'"
        shift 2
        ;;
      --num_machines | --machine_rank | --main_process_ip | --main_process_port)
        [ $# -gt 1 ] || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
      -*) fail "unknown option $1; see ./launch.sh --help" ;;
      *) break ;;
    esac
  done

  if [ $# -eq 0 ]; then
    usage >&2
    exit 2
  fi
  if [ -n "$config" ]; then
    case $1 in test | lint) fail "$1 does not go with --config" ;; esac
    [ -f "$(config_file "$config")" ] ||
      fail "--config $config: there is no $(config_file "$config"); choose from: $(configs)"
    case $config in
      multi_node_*) node_options "$config" ;;
      *)
        [ -z "$num_machines$machine_rank$main_process_ip$main_process_port" ] ||
          fail "--num_machines and the like go with a configuration for several machines: multi_node_*"
        ;;
    esac
  elif [ -n "$processes" ]; then
    fail "--num_processes goes with --config; choose one from: $(configs)"
  fi

  case $1 in
    test)
      enter test
      cd "$root"
      exec "$venv/bin/python" -m pytest "${@:2}"
      ;;
    lint)
      enter test
      cd "$root"
      lint
      exit
      ;;
    *.yaml | *.yml) set -- train "$@" ;;
  esac

  enter run
  if [ -n "$config" ]; then
    run_accelerate "$config" "$processes" "$@"
  else
    run_single "$@"
  fi
}

main "$@"
