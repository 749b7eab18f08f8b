# Lines above: commands that have an option (data/check is a part of data), the option ("-" is an
# argument without a name), and its values.

_mpo_lightning() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    local command=${COMP_WORDS[1]} values= names= of name words rest IFS=$' \t\n'
    COMPREPLY=()
    # To bash "=" is a word of its own.
    if [ "$current" = "=" ]; then
        current=
    elif [ "$previous" = "=" ]; then
        previous=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if [ "$COMP_CWORD" -eq 1 ]; then
        command=mpo-lightning previous=-
    elif [ "$COMP_CWORD" -eq 2 ] && [[ $previous != -* ]]; then
        previous=-
    fi
    while IFS='|' read -r of name words; do
        case " $of " in
            *" $command "* | *" $command/${COMP_WORDS[2]-} "*)
                [ "$name" = "$previous" ] && values=$words
                [ "$name" = - ] || names+=" $name"
                ;;
        esac
    done <<< "$_mpo_lightning_settings"
    case "$current" in
        -*)
            # Names up to their next dot, like folders: all of them would fill the screen.
            for name in $names; do
                case "$name" in
                    "$current"*.*)
                        rest=${name#"$current"}
                        case "$rest" in
                            *.*)
                                COMPREPLY+=("$current${rest%%.*}.")
                                compopt -o nospace 2>/dev/null
                                ;;
                            *) COMPREPLY+=("$name") ;;
                        esac
                        ;;
                    "$current"*) COMPREPLY+=("$name") ;;
                esac
            done
            ;;
        *)
            if [ -n "$values" ]; then
                COMPREPLY=($(compgen -W "$values" -- "$current"))
            else
                compopt -o filenames 2>/dev/null
                IFS=$'\n'
                COMPREPLY=($(compgen -f -- "$current"))
            fi
            ;;
    esac
}

complete -F _mpo_lightning mpo-lightning
