# Sourced by scripts here.

run_of() { # the run folder of a config, as the command line names it: configs/digits/cd.yaml gives runs/digits/cd
    local path
    path=$(realpath -m "${1%.*}")
    case $path in
        */configs/*) echo "runs/${path##*/configs/}" ;;
        *) echo "runs/$(basename "$(dirname "$path")")/$(basename "$path")" ;;
    esac
}
