#!/usr/bin/env bash
# The API server and the controller manager of Kubernetes, built once from Debian's source package for the tests; prints the folder they are in.
# Needs golang-go and dpkg-dev; sources come from where this machine's packages come from. Never used to serve anything.
set -euo pipefail
kept="${XDG_CACHE_HOME:-$HOME/.cache}/mlops-nb/cluster-1.20.2"
programs=(kube-apiserver kube-controller-manager)

there() { for p in "${programs[@]}"; do [ -x "$kept/$p" ] || return 1; done; }
if there; then echo "$kept"; exit; fi
if [ "${1:-}" != build ]; then exit 1; fi                                   # only asked where they are

mkdir -p "$(dirname "$kept")"
work="$(mktemp -d "$(dirname "$kept")/build.XXXXXX")"
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
say() { echo "cluster: $* ($SECONDS s)" >&2; }

# 1. Debian's own sources, in lists of our own: the machine's stay what they are
code="$(. /etc/os-release && echo "$VERSION_CODENAME")"
mkdir -p "$work/parts" "$work/lists/partial"
for list in /etc/apt/sources.list.d/*.sources; do
  if grep -q "^Suites:.*\b$code" "$list" 2>/dev/null; then sed 's/^Types:.*/Types: deb deb-src/' "$list" >"$work/parts/$(basename "$list")"; fi
done
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  if [ -f "$list" ]; then { grep -E "^deb .*[ /]$code(-[a-z]+)? main" "$list" || true; } | sed 'p;s/^deb /deb-src /' >"$work/parts/$(basename "$list" .list | tr -d .).list"; fi
done
apt=(-qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/parts" -o Dir::State::lists="$work/lists" -o APT::Sandbox::User=root
     -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none -o Acquire::Retries=3)
cd "$work"
apt-get "${apt[@]}" update
apt-get "${apt[@]}" source --download-only 'kubernetes' >&2
apt-get "${apt[@]}" download golang-github-modern-go-reflect2-dev >&2
dpkg-source --no-check -x kubernetes_1.20.5+really1.20.2*.dsc source >/dev/null
say "sources are here"

# 2. A Go workspace as it was before modules
export GOPATH="$work/go" GOCACHE="$work/cache" GOTMPDIR="$work" GO111MODULE=off CGO_ENABLED=0 GOFLAGS=
mkdir -p "$GOPATH/src/k8s.io"
mv source "$GOPATH/src/k8s.io/kubernetes"
cd "$GOPATH/src/k8s.io/kubernetes"

# 3. The vendored reflect2 crashes under this Go; Debian's own does not
dpkg -x "$work"/golang-github-modern-go-reflect2-dev_*.deb "$work/reflect2"
old=vendor/github.com/modern-go/reflect2
rm -f "$old"/*.go "$old"/*.s
find "$work/reflect2" \( -name '*.go' -o -name '*.s' \) ! -name '*_test.go' -path '*/reflect2/*.*' -exec cp {} "$old/" \;

# 4. What the source package leaves out: the definitions of all types, generated
go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
folders="$(grep -rlE --include='*.go' --exclude='*_test.go' '\+k8s:openapi-gen=' pkg cmd plugin vendor/k8s.io staging/src/k8s.io 2>/dev/null |
  xargs -n1 dirname | sed 's#^staging/src/#vendor/#' | sort -u | grep -vE 'code-generator|sample-apiserver|_examples|kube-openapi|gengo|/testdata' | sed 's#^#k8s.io/kubernetes/#' | paste -sd,)"
"$work/openapi-gen" -i "$folders" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r "$work/violations" >&2
say "types are generated"

# 5. The programs, without the clouds' libraries and without optimisation: they live for minutes
stamp="-s -w"
for package in k8s.io/kubernetes/vendor/k8s.io/component-base/version k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version; do
  stamp="$stamp -X $package.gitVersion=v1.20.2 -X $package.gitMajor=1 -X $package.gitMinor=20"
done
mkdir "$work/made"
for p in "${programs[@]}"; do
  go build -p "$(nproc)" -tags providerless -gcflags "all=-N -l -dwarf=false" -ldflags "$stamp" -o "$work/made/$p" "k8s.io/kubernetes/cmd/$p"
  say "$p is built"
done
rm -rf "$kept"
mv "$work/made" "$kept"
echo "$kept"
