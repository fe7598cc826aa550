#!/bin/busybox sh
# The whole of a test guest: mounts, modules, the guest agent, and a loop that
# runs the commands the test sends.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /data /etc
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# In this order; what a kernel has built in has no file here.
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
    virtio_blk virtio_console; do
    if [ -e /modules/$module.ko ]; then
        insmod /modules/$module.ko
    fi
done

# Prints the device of a virtio-serial port, waiting for it to appear.
port() {
    for try in $(seq 200); do
        for port in /sys/class/virtio-ports/*; do
            if [ "$(cat "$port/name" 2>/dev/null)" = "$1" ]; then
                echo "/dev/${port##*/}"
                return
            fi
        done
        usleep 20000
    done
    echo "no port $1" >&2
}

# A disk without a file system is one the test writes to directly.
mount -t ext4 /dev/vda /data 2>/dev/null

qemu-ga -m virtio-serial -p "$(port org.qemu.guest_agent.0)" -t /run -f /run/qemu-ga.pid \
    >/tmp/agent 2>&1 </dev/null &

# One line is a shell command; its output and a line with its exit status go
# back. Reading fails as long as nobody is connected at the other end.
control=$(port org.highwater.control)
export WRITER_PORT=$(port org.highwater.writer)
while :; do
    exec 3<>"$control"
    while read -r command <&3; do
        sh -c "$command" >/tmp/output 2>&1 </dev/null
        status=$?
        { cat /tmp/output; echo "@exit $status"; } >&3
    done
    exec 3>&-
    usleep 20000
done
