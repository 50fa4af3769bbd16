#!/bin/sh
# Make the parts that an emulated Raspberry Pi boots from; nothing of the system is executed here:
#   vmlinuz     Debian's kernel
#   initrd.gz   what finds the disk: busybox and a few modules
#   disk.img    the system: systemd, Python with venv, sudo for the user pi; packages only unpacked
# bookworm has pages of 4 KiB, as Raspberry Pi OS on a Zero 2 W or a Pi 4 has, trixie of 16 KiB, as
# on a Pi 5.
# Usage: make_system.sh bookworm|trixie DIRECTORY
set -eu
suite=$1 directory=$2
here=$(cd "$(dirname "$0")" && pwd)
packages=mmdebstrap,qemu-system-arm,e2fsprogs,kmod,cpio,xz-utils,device-tree-compiler
for tool in mmdebstrap qemu-system-aarch64 mkfs.ext4 depmod cpio xz fdtput; do
    if ! PATH=$PATH:/sbin:/usr/sbin command -v $tool >/dev/null; then
        echo "$tool is not there: apt install $(echo $packages | tr , ' ')" >&2
        exit 1
    fi
done
PATH=$PATH:/sbin:/usr/sbin
case $suite in
bookworm) kernel=linux-image-cloud-arm64 ;;
trixie) kernel=linux-image-arm64-16k ;;
esac
rm -rf "$directory"
mkdir -p "$directory"
cd "$directory"

mmdebstrap --quiet --architectures=arm64 --variant=extract \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --include=$kernel,busybox-static \
    --include=base-files,base-passwd,bash,coreutils,findutils,grep,libc-bin,mount,passwd,procps,sed \
    --include=dbus,kmod,libpam-modules,sudo,systemd,systemd-sysv,udev,util-linux \
    --include=ca-certificates,libgomp1,libstdc++6,python3,python3-venv "$suite" root
cp root/boot/vmlinuz-* vmlinuz
rm -r root/boot

# What the packages' own scripts would have done.
cp root/usr/share/base-passwd/passwd.master root/etc/passwd
cp root/usr/share/base-passwd/group.master root/etc/group
cat root/usr/share/ca-certificates/mozilla/*.crt >root/etc/ssl/certs/ca-certificates.crt
for user in messagebus:100 pi:1000; do
    echo "${user%:*}:x:${user#*:}:${user#*:}::/home/${user%:*}:/bin/bash" >>root/etc/passwd
    echo "${user%:*}:x:${user#*:}:" >>root/etc/group
done
for program in other runuser sudo; do
    printf '%s required pam_permit.so\n' auth account session password >root/etc/pam.d/$program
done
echo 'pi ALL=(ALL) NOPASSWD: ALL' >root/etc/sudoers.d/010_pi-nopasswd
mkdir -p root/home/pi root/media/stick
chown 1000:1000 root/home/pi
echo raspberrypi >root/etc/hostname
echo 127.0.0.1 localhost raspberrypi >root/etc/hosts
: >root/etc/machine-id
echo LABEL=stick /media/stick ext4 ro,nofail >root/etc/fstab
# The board has no network: its packages come on a stick.
printf '%s\n' '[global]' 'no-index = true' 'find-links = /media/stick/wheels' \
    'progress-bar = off' 'disable-pip-version-check = true' >root/etc/pip.conf
install -m 755 "$here/guest/board-init" root/usr/sbin/
install -m 644 "$here/guest/board-run.service" root/etc/systemd/system/
mkdir -p root/etc/systemd/system/multi-user.target.wants
ln -s ../board-run.service root/etc/systemd/system/multi-user.target.wants/

version=$(ls root/usr/lib/modules)
depmod -b root "$version"
mkdir -p initrd/bin initrd/dev initrd/modules initrd/root
cp root/bin/busybox initrd/bin/
install -m 755 "$here/guest/initrd-init" initrd/init
number=100
for wanted in virtio_mmio virtio_pci virtio_blk ext4; do
    modprobe -d root -S "$version" --show-depends $wanted 2>/dev/null | grep ^insmod >depends || true
    while read -r _ file _; do
        name=$(basename "$file" .xz)
        if ls initrd/modules | grep -q -- "-$name\$"; then continue; fi
        number=$((number + 1))
        case $file in
        *.xz) xz -dc "$file" >"initrd/modules/$number-$name" ;;
        *) cp "$file" "initrd/modules/$number-$name" ;;
        esac
    done <depends
done
(cd initrd && find . | cpio --quiet --create --format=newc) | gzip -1 >initrd.gz

mkfs.ext4 -q -L system -d root disk.img 1600M >/dev/null
rm -rf root initrd depends
