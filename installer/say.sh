# shellcheck shell=bash
# What the installer says to a person, and how it gives up.

# How many things this run has changed.
CHANGES=0

# Not to be heard is no reason to break off.
say() { printf '%s\n' "$*" || true; }

note() { printf 'note: %s\n' "$*" >&2 || true; }

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
