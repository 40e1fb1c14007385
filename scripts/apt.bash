# Debian packages, for scripts that need some. Sourced by them; they have a `say`.

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Installs packages: apt "what is needed" PACKAGE...
apt() {
    if ! command -v apt-get >/dev/null; then
        say "need $1; install it and try again"
        exit 1
    fi
    say "installing ${*:2} (apt-get), this happens once ..."
    as_root apt-get update -qq >&2
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "${@:2}" >&2
}
