# shellcheck shell=bash
# A release: a locked, hash-checked environment under /opt, made once and then never changed.

# The file that is written last: without it a release was broken off in the making.
MARKER=share/rvmcv-worker/whole

current_release() {
  [ ! -L "$CURRENT" ] || basename -- "$(readlink -- "$CURRENT")"
}

source_version() {
  sed -nE '/^\[project\]/,/^\[/s/^version = "([A-Za-z0-9.+-]+)".*/\1/p' "$SOURCE/pyproject.toml"
}

# One word for everything that makes a release what it is.
fingerprint() {
  (
    cd -- "$SOURCE" || exit
    find rvmcv_worker systemd installer install.sh config.toml pyproject.toml requirements.lock -type f \
      ! -name '*.py[co]' ! -path '*/.*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    "$PYTHON" -I -c 'import sys; print(sys.version_info[:2])'
    echo "compute: ${COMPUTE:-no}"
  ) | sha256sum | cut -c -64
}

release_is_whole() { [ -e "$RELEASES/$1/$MARKER" ]; }

# Sets RELEASE, the name of this source's release: the one that it has here already, else its version, or, where
# that name is another build's, the version with a part of the fingerprint behind.
find_release() {
  [ -z "${RELEASE:-}" ] || return 0
  local version dir
  version=$(source_version)
  [ -n "$version" ] || refuse "$SOURCE/pyproject.toml: no version in [project]"
  FINGERPRINT=$(fingerprint)
  for dir in "$RELEASES/$version" "$RELEASES/$version+"*; do
    RELEASE=$(basename -- "$dir")
    ! release_is_whole "$RELEASE" || [ "$(<"$dir/$MARKER")" != "$FINGERPRINT" ] || return 0
  done
  RELEASE=$version
  ! release_is_whole "$RELEASE" || RELEASE=$version+${FINGERPRINT:0:8}
}

build_release() {
  ! release_is_whole "$RELEASE" || return 0
  prepare_uv
  local dir=$RELEASES/$RELEASE lock=$SOURCE/requirements.lock extras=() sources=() wheels
  [ ! -e "$dir" ] || remove "$dir"
  mkdir -p "$RELEASES"
  [ -z "$COMPUTE" ] || extras=(--extra compute)
  [ -z "$WHEELHOUSE" ] || sources=(--no-index --find-links "$WHEELHOUSE" --offline)
  # A cache for each lock: what two releases have in common is on the disk once, and no cache outlives them.
  UV_CACHE_DIR=$CACHE/$(sha256sum "$lock" | cut -c -16)
  export UV_CACHE_DIR UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 UV_SYSTEM_CERTS=1 SAM2_BUILD_CUDA=0
  say "making release $RELEASE in $dir${COMPUTE:+; with everything that trains this takes some minutes}"
  "$UV" venv --quiet --python "$PYTHON" "$dir" || build_failed "the environment could not be made"
  "$UV" pip install --quiet --python "$dir/bin/python" --compile-bytecode --require-hashes "${sources[@]}" \
    --build-constraints "$lock" -c "$lock" -r "$SOURCE/pyproject.toml" "${extras[@]}" ||
    build_failed "the locked packages could not be installed"
  wheels=$dir/share/rvmcv-worker/wheel
  "$UV" build --quiet --wheel --python "$dir/bin/python" --require-hashes --build-constraints "$lock" \
    "${sources[@]}" --out-dir "$wheels" "$SOURCE" || build_failed "the worker's own wheel could not be built"
  "$UV" pip install --quiet --python "$dir/bin/python" --compile-bytecode --no-deps --offline "$wheels"/*.whl ||
    build_failed "the worker's own wheel could not be installed"
  rm -r -- "$wheels"
  cp -r -- "$SOURCE/systemd" "$SOURCE/installer" "$SOURCE/install.sh" "$SOURCE/config.toml" \
    "$SOURCE/requirements.lock" "$SOURCE/pyproject.toml" "$dir/share/rvmcv-worker/"
  "$dir/bin/rvmcv-worker" version >/dev/null || build_failed "the program in it does not start"
  chown -R root:root "$dir"
  chmod -R u=rwX,go=rX "$dir"
  chmod -R go-w "$CACHE" # uv lets everybody write its locks
  sync --file-system "$dir"
  printf '%s\n' "$FINGERPRINT" >"$dir/$MARKER.part"
  mv -T -- "$dir/$MARKER.part" "$dir/$MARKER"
  changed "made: $dir"
}

build_failed() {
  refuse "$1 (see above); $RELEASES/$RELEASE is unfinished and not used. Mend the cause (network, disk, or a file" \
    "that is not the one in requirements.lock), then run this again"
}

switch_to() { # RELEASE
  put_link "releases/$1" "$CURRENT"
  put_link "$CURRENT/bin/rvmcv-worker" "$COMMAND"
}

# Keeps the release in use and the one before it, and the caches whose files they share.
remove_old_releases() {
  local current previous dir kept=()
  current=$(current_release)
  previous=$(cat -- "$OPT/previous" 2>/dev/null || true)
  for dir in "$RELEASES"/*; do
    [ -d "$dir" ] || continue
    case $(basename -- "$dir") in
      "$current" | "$previous") kept+=("$(sha256sum "$dir/share/rvmcv-worker/requirements.lock" | cut -c -16)") ;;
      *) remove "$dir" ;;
    esac
  done
  for dir in "$CACHE"/*; do
    [ -d "$dir" ] || continue
    [[ " ${kept[*]} " == *" $(basename -- "$dir") "* ]] || remove "$dir"
  done
}
