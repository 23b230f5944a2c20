#!/usr/bin/env bash
# Make an emulated ARM64 Linux with this project in it, on an x86 one: tools/arm/build.sh FOLDER (8 GB, half an hour).
#
# Needs root, Debian or Ubuntu, Linux 6.7 or later (enter.py registers qemu in a namespace of its own), and `make
# install`. llama.cpp is cross-compiled twice, for processors with half-precision arithmetic and dot products (Apple M1,
# Cortex-A76) and for those that multiply matrices of int8 as well (Apple M2, Neoverse V1). Then: tools/arm/check.sh FOLDER
set -euo pipefail
project=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "${1:?the folder to make it in}" && cd "$1"
python=$project/.venv/bin/python
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
packages=root/usr/local/lib/python3.11/dist-packages

apt-get install -y --no-install-recommends \
  qemu-user-static debootstrap gcc-aarch64-linux-gnu g++-aarch64-linux-gnu cmake ninja-build

if [ ! -e root/.unpacked ]; then  # debootstrap's second stage would run emulated, for twenty minutes: unpacking will do
  debootstrap --arch=arm64 --variant=minbase --foreign --include=python3,libgomp1,libstdc++6 bookworm stage1
  mkdir -p root/{proc,sys,dev,tmp,root,share} root/usr/{bin,sbin,lib} $packages share
  for folder in bin sbin lib; do ln -sfn usr/$folder root/$folder; done
  for package in stage1/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C root --keep-directory-symlink
  done
  touch root/.unpacked
fi

# Wheels for ARM; of llama-cpp-python its Python, which is the same everywhere.
"$python" -m pip download -q -d wheels --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
  --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 \
  --only-binary=:all: -c "$project/constraints.txt" \
  numpy gguf click rich platformdirs huggingface_hub pytest hypothesis diskcache jinja2 typing_extensions
for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" $packages; done
site=$("$python" -c 'import llama_cpp; print(llama_cpp.__path__[0])')
cp -r "$site" "${site}_python-$version.dist-info" $packages/
rm -rf $packages/llama_cpp/lib

"$python" -m pip download -q --no-deps --no-binary :all: "llama-cpp-python==$version" -d sdist
[ -d llama.cpp ] || { mkdir llama.cpp && tar -xf sdist/*.tar.gz -C llama.cpp --strip-components=3 --wildcards '*/vendor/llama.cpp'; }
cat > toolchain.cmake <<'T'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
T
for build in dotprod:armv8.2-a+dotprod+fp16 i8mm:armv8.2-a+dotprod+fp16+i8mm; do
  cmake -G Ninja -S llama.cpp -B build -DCMAKE_TOOLCHAIN_FILE="$PWD/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH="${build#*:}" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' > cmake.log
  nice ninja -C build llama
  mkdir -p "$packages/llama_cpp/lib-${build%%:*}"
  cp -L build/bin/*.so build/bin/*.so.0 "$packages/llama_cpp/lib-${build%%:*}/"
done
echo "made; now: $project/tools/arm/check.sh $PWD"
