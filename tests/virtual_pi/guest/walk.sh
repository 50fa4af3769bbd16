# On the board, under systemd: the documents' commands, block by block, as the user gives them; then
# a service that hangs.
cp -r home/* /home/pi
chown -R pi:pi /home/pi/raspberry_pi /home/pi/model.bank /home/pi/input.npz
cd /home/pi
for block in /media/stick/blocks/*; do
    runuser -u pi -- bash -ex "$block"
done

properties=ActiveState,NRestarts,MemoryHigh,MemoryCurrent,WatchdogUSec
tell() {
    systemctl show bapq-serve --property=$properties | sed 's/\(.*\)=\(.*\)/"\1": "\2"/' |
        paste -sd, | sed 's/.*/{&}/'
}
tell

mkdir -p /run/systemd/system/bapq-serve.service.d
printf '[Service]\nWatchdogSec=20\n' >/run/systemd/system/bapq-serve.service.d/impatient.conf
systemctl daemon-reload
systemctl restart bapq-serve
systemctl kill --signal=STOP bapq-serve
for second in $(seq 900); do
    if tell | grep -q '"active".*"NRestarts": "1"\|"NRestarts": "1".*"active"'; then break; fi
    echo "waiting for $second s"
    sleep 1
done
tell
