# shellcheck shell=bash
# What the installer says to a person, and how it gives up.

# How many things this run has changed.
CHANGES=0

say() { printf '%s\n' "$*"; }

note() { printf 'note: %s\n' "$*" >&2; }

changed() {
  CHANGES=$((CHANGES + 1))
  say "$*"
}

refuse() {
  printf 'install.sh: %s\n' "$*" >&2
  exit 1
}

misused() {
  printf 'install.sh: %s (see install.sh --help)\n' "$*" >&2
  exit 2
}
