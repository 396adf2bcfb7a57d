#!/usr/bin/env bash
# A private Rust toolchain that can compile for x86_64-pc-windows-gnu, for machines on which
# `rustup target add x86_64-pc-windows-gnu` has nothing to download from. Debian 12 or later.
#
#   windows-toolchain.sh [--no-wine]     --no-wine: compile and check only, no Wine to run the result
#
# Debian's second rustc (rustc-web) is unpacked, not installed, into $PREFIX; std is built there for Windows
# from Debian's sources; the mingw-w64 C compiler (and Wine) come from apt. Nothing is put on PATH and rustup
# does not hear of it. A second run finds everything in place and only prints the prefix.
# The last line on stdout is the prefix: PREFIX/usr/bin/cargo with LD_LIBRARY_PATH=PREFIX/usr/lib.
# Undo: rm -rf "$PREFIX".
set -euo pipefail

prefix=${STILLPOINT_WINDOWS_TOOLCHAIN:-${XDG_CACHE_HOME:-$HOME/.cache}/stillpoint/rust-windows}
target=x86_64-pc-windows-gnu
wine=1
case ${1:-} in
  '') ;;
  --no-wine) wine=0 ;;
  *) echo "usage: windows-toolchain.sh [--no-wine]" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
log() { printf '[windows-toolchain] %s\n' "$*" >&2; }
root=(); [ "$(id -u)" = 0 ] || root=(sudo -n)
apt() { "${root[@]}" apt-get -o DPkg::Lock::Timeout=600 -q "$@" >&2; }

mkdir -p "$prefix"
exec 9>"$prefix.lock"
flock 9 # two test runs at once would unpack over each other

# 1. The C cross compiler, and the shared libraries that the unpacked rustc and cargo load.
need=()
packages=(gcc-mingw-w64-x86-64-win32 g++-mingw-w64-x86-64-win32
          libcurl4 libssh2-1 libsqlite3-0 libssl3 libedit2 libxml2 libz3-4 libstdc++6)
[ "$wine" = 0 ] || packages+=(wine64)
for p in "${packages[@]}"; do dpkg -s "$p" >/dev/null 2>&1 || need+=("$p"); done
if [ ${#need[@]} -gt 0 ] || [ ! -e "$prefix/.unpacked" ]; then apt update; fi
if [ ${#need[@]} -gt 0 ]; then
  log "installing ${need[*]}"
  apt install -y --no-install-recommends "${need[@]}"
fi

# 2. Debian's second rustc: all of its parts at one version, with the LLVM and libgit2 that they name.
if [ ! -e "$prefix/.unpacked" ]; then
  rm -rf "$prefix"; mkdir -p "$prefix/debs"
  version=$(apt-cache policy rustc-web | awk '/Candidate:/{print $2}')
  if [ -z "$version" ] || [ "$version" = "(none)" ]; then log "apt knows no package rustc-web"; exit 1; fi
  upstream=${version%%+*}; minor=${upstream%.*}
  llvm=$(apt-cache show "libstd-rust-web-$minor=$version" | grep -oE 'libllvm[0-9]+' | head -1)
  git2=$(apt-cache show "cargo-web=$version" | grep -oE 'libgit2-[0-9.]+' | head -1)
  log "unpacking rustc-web $version ($llvm, $git2) under $prefix"
  ( cd "$prefix/debs"
    apt-get -q download "rustc-web=$version" "cargo-web=$version" "libstd-rust-web-dev=$version" \
      "libstd-rust-web-$minor=$version" "rust-web-src=$version" "$llvm" \
      "$git2" libmbedtls14 libmbedx509-1 libmbedcrypto7 libhttp-parser2.9 >/dev/null
    for deb in *.deb; do dpkg-deb -x "$deb" "$prefix"; done )
  rm -rf "$prefix/debs" "$prefix/usr/share"
  # Of the sources only library/ is needed: 69 MB of 434 MB.
  find "$prefix"/usr/src/rustc-*/ -mindepth 1 -maxdepth 1 ! -name library -exec rm -rf {} +
  # One folder for LD_LIBRARY_PATH, whatever the multiarch name is.
  ( cd "$prefix/usr/lib" && for f in x86_64-linux-gnu/*.so*; do ln -sfn "$f" "${f##*/}"; done )
  touch "$prefix/.unpacked"
fi

# 3. std for Windows, built once into this toolchain's sysroot, so that a plain `cargo --target` finds it.
lib=$prefix/usr/lib/rustlib/$target/lib
if [ ! -e "$lib/.complete" ]; then
  log "building std for $target (2 to 5 minutes, once)"
  build=$prefix/build-std; rm -rf "$build" "$lib"; mkdir -p "$build/src" "$lib"
  printf '[package]\nname = "sysroot_seed"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n' > "$build/Cargo.toml"
  printf '#![no_std]\n' > "$build/src/lib.rs"
  ( cd "$build" && env -u RUSTFLAGS -u CARGO_BUILD_TARGET -u RUSTC_WRAPPER RUSTC_BOOTSTRAP=1 \
      CARGO_TARGET_DIR="$build/target" RUSTC="$prefix/usr/bin/rustc" LD_LIBRARY_PATH="$prefix/usr/lib" \
      "$prefix/usr/bin/cargo" build -q --release \
      -Zbuild-std=std,panic_abort,panic_unwind,proc_macro,test --target "$target" >&2 )
  for f in "$build/target/$target/release/deps/"*.rlib; do
    case $f in *sysroot_seed*) ;; *) cp "$f" "$lib/" ;; esac
  done
  rm -rf "$build"
  touch "$lib/.complete"
fi

# 4. Wine: a runner for cargo, with a Wine prefix made on first use. Debian 12's Wine 8.0 has no
#    bcryptprimitives.dll, which every program built with Rust 1.78 or later loads: a stand-in of one function.
if [ "$wine" = 1 ] && [ ! -x "$prefix/run-wine" ]; then
  cat > "$prefix/bcryptprimitives.c" <<'C'
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID b, ULONG n); /* RtlGenRandom */
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE b, SIZE_T n) {
  while (n) { ULONG k = n > 0x10000000 ? 0x10000000 : (ULONG)n;
    if (!SystemFunction036(b, k)) return FALSE; b += k; n -= k; }
  return TRUE; }
C
  x86_64-w64-mingw32-gcc -O2 -s -shared -o "$prefix/bcryptprimitives.dll" "$prefix/bcryptprimitives.c" -ladvapi32
  cat > "$prefix/run-wine" <<W
#!/usr/bin/env bash
# Runs a Windows program under Wine, headless and quiet: CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER.
export WINEPREFIX=\${WINEPREFIX:-$prefix/wineprefix} WINEDEBUG=\${WINEDEBUG:--all}
export WINEDLLOVERRIDES=\${WINEDLLOVERRIDES:-mscoree,mshtml=}
unset DISPLAY
(
  flock 9
  if [ ! -e "\$WINEPREFIX/.ready" ]; then
    mkdir -p "\$WINEPREFIX"
    /usr/lib/wine/wine64 wineboot --init >/dev/null 2>&1 9>&-
    cp "$prefix/bcryptprimitives.dll" "\$WINEPREFIX/drive_c/windows/system32/"
    touch "\$WINEPREFIX/.ready"
  fi
) 9>"\${WINEPREFIX%/}.lock"
exec /usr/lib/wine/wine64 "\$@"
W
  chmod +x "$prefix/run-wine"
fi

log "ready: $(LD_LIBRARY_PATH="$prefix/usr/lib" "$prefix/usr/bin/rustc" -V), mingw gcc $(x86_64-w64-mingw32-gcc -dumpversion), $(du -sh "$prefix" | cut -f1)"
echo "$prefix"
