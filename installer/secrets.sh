# shellcheck shell=bash
# The token and MinIO's keys: from a file or a terminal into files of root's, never through an argument.

# Variables of the shell, which no other process sees; empty: keep what is there.
TOKEN='' S3_ACCESS_KEY='' S3_SECRET_KEY=''

gather_secrets() {
  [ -z "$TOKEN_FILE" ] || TOKEN=$(read_secret "$TOKEN_FILE")
  [ -z "$S3_ACCESS_KEY_FILE" ] || S3_ACCESS_KEY=$(read_secret "$S3_ACCESS_KEY_FILE")
  [ -z "$S3_SECRET_KEY_FILE" ] || S3_SECRET_KEY=$(read_secret "$S3_SECRET_KEY_FILE")
  [ -z "$TOKEN" ] && [ ! -s "$CREDENTIALS/token" ] || return 0
  { : </dev/tty; } 2>/dev/null ||
    refuse "no token: put RVM-Server's worker token into a file and name it by --token-file, or run this at a terminal"
  local typed
  IFS= read -rsp "RVM-Server's worker token (not shown): " typed </dev/tty
  echo >/dev/tty
  TOKEN=$(checked_secret "what was typed" <<<"$typed")
}

read_secret() { # FILE
  [ -e "$1" ] || refuse "$1: no such file: it must hold the secret alone"
  [ -f "$1" ] || refuse "$1: a directory, a pipe or the like: write the secret alone into a file"
  [ -z "$(find -L "$1" -maxdepth 0 -perm /044)" ] || note "others may read $1: shred -u it when this is done"
  [ "$(stat -Lc %s -- "$1")" -le 8192 ] || refuse "$1: larger than 8192 bytes: write the secret alone into it"
  checked_secret "$1" < <(cat -- "$1")
}

# Reads a secret and writes it out; what no HTTP header can carry is refused without being shown.
checked_secret() { # WHENCE
  local secret LC_ALL=C # the range below is one of bytes
  secret=$(tr -d '\0\r')
  [ -n "$secret" ] || refuse "$1: empty: the secret is wanted, as it was issued"
  [[ ! $secret =~ [^!-~] ]] || refuse "$1: holds a space, a second line or no ASCII: the secret alone is wanted"
  printf '%s\n' "$secret"
}

put_secrets() {
  install -d -m 0755 "$ETC"
  install -d -m 0700 "$CREDENTIALS"
  put_secret token "$TOKEN"
  put_secret s3-access-key "$S3_ACCESS_KEY"
  put_secret s3-secret-key "$S3_SECRET_KEY"
}

put_secret() { # NAME SECRET
  local file=$CREDENTIALS/$1
  [ -n "$2" ] || return 0
  [ ! -f "$file" ] || [ "$(<"$file")" != "$2" ] || return 0
  (
    umask 077
    printf '%s\n' "$2" >"$file.part"
  )
  mv -fT -- "$file.part" "$file"
  changed "written: $file"
  SECRETS_CHANGED=yes
  [ "$1" = token ] || KEYS_CHANGED=yes
}
