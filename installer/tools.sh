# shellcheck shell=bash
# uv, which installs everything else, in an environment of its own; as the lock has it, hash and all.

# Writes a package's stanza of the lock: its line and the hashes beneath.
stanza() { # PACKAGE
  awk -v want="$1==" 'index($0, want) == 1 { on = 1 } on && !/^(    --hash|    #)/ && index($0, want) != 1 { on = 0 }
    on && !/^    #/' "$SOURCE/requirements.lock"
}

prepare_uv() {
  local requirement version dir sources=()
  requirement=$(stanza uv)
  version=$(sed -nE '1s/^uv==([^ ;]+).*/\1/p' <<<"$requirement")
  [ -n "$version" ] || refuse "$SOURCE/requirements.lock names no uv: is the source tree whole?"
  dir=$TOOLS/uv-$version
  UV=$dir/bin/uv
  if [ ! -e "$dir/whole" ]; then
    [ ! -e "$dir" ] || remove "$dir"
    say "installing uv $version, which installs the rest"
    mkdir -p "$TOOLS"
    "$PYTHON" -I -m venv "$dir" || refuse "$PYTHON -m venv $dir failed (see above): is python3-venv installed?"
    [ -z "$WHEELHOUSE" ] || sources=(--no-index --find-links "$WHEELHOUSE")
    printf '%s\n' "$requirement" >"$dir/requirements.txt"
    PIP_CERT=$SYSTEM_CERTIFICATES PIP_DISABLE_PIP_VERSION_CHECK=1 "$dir/bin/python" -I -m pip install --quiet --no-cache-dir --require-hashes \
      --no-deps "${sources[@]}" -r "$dir/requirements.txt" ||
      refuse "uv $version could not be installed (see above): check the network, or use --wheelhouse"
    touch "$dir/whole"
    changed "installed: $dir"
  fi
  local other
  for other in "$TOOLS"/uv-*; do
    [ "$other" = "$dir" ] || [ ! -e "$other" ] || remove "$other"
  done
}
