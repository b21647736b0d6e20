// From a multiboot loader (32-bit protected mode) to lw_main: long mode, the first gigabyte mapped
// one to one, SSE, AVX and AVX-512 state switched on, every exception led to lw_fault.
        .set    FLAGS, 0
        .set    MAGIC, 0x1badb002
        .section .multiboot, "a"
        .align  4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)

        .text
        .code32
        .globl  _start
_start: cli
        movl    $stack_top, %esp
        // Page tables: one PML4 entry, one PDPT entry, 512 pages of 2 MB.
        movl    $(lw_pdpt + 3), lw_pml4
        movl    $(lw_page_table + 3), lw_pdpt
        xorl    %ecx, %ecx
1:      movl    %ecx, %eax
        shll    $21, %eax
        orl     $0x83, %eax
        movl    %eax, lw_page_table(, %ecx, 8)
        movl    $0, lw_page_table + 4(, %ecx, 8)
        incl    %ecx
        cmpl    $512, %ecx
        jne     1b
        movl    $lw_pml4, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orl     $0x40620, %eax          // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx       // EFER.LME
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        andl    $~0xe, %eax             // EM, TS off
        orl     $0x80000002, %eax       // PG, MP
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $8, $long_mode

        .code64
long_mode:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        xorl    %eax, %eax
        movw    %ax, %fs
        movw    %ax, %gs
        movl    $stack_top, %esp
        // 32 gates to the stubs, which are 16 bytes each.
        xorl    %ecx, %ecx
        leaq    idt(%rip), %rdi
        leaq    stubs(%rip), %rsi
2:      movq    %rsi, %rax
        movw    %ax, (%rdi)
        movw    $8, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shrq    $16, %rax
        movw    %ax, 6(%rdi)
        movq    $0, 8(%rdi)
        addq    $16, %rdi
        addq    $16, %rsi
        incl    %ecx
        cmpl    $32, %ecx
        jne     2b
        lidt    idt_pointer
        xorl    %ecx, %ecx
        xgetbv
        orl     $0xe7, %eax             // x87, SSE, AVX, masks and both halves of AVX-512
        xsetbv
        fninit
        call    lw_main

        // Exceptions 8, 10-14, 17, 21, 29, 30 push an error code above the return address.
        .align  16
stubs:
        .set    vector, 0
        .rept   32
        .align  16
        movl    $vector, %edi
        .if     vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
        movq    8(%rsp), %rsi
        .else
        movq    (%rsp), %rsi
        .endif
        jmp     fault
        .set    vector, vector + 1
        .endr
fault:  andq    $-64, %rsp
        call    lw_fault

        .section .rodata
        .align  8
gdt:    .quad   0
        .quad   0x00af9a000000ffff      // 64-bit code
        .quad   0x00cf92000000ffff      // data
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
        .long   0
idt_pointer:
        .word   32 * 16 - 1
        .quad   idt

        .bss
        .align  4096
        .globl  lw_page_table
lw_pml4:        .skip 4096
lw_pdpt:        .skip 4096
lw_page_table:  .skip 4096
        .align  16
idt:            .skip 32 * 16
        .align  64
                .skip 1 << 20
stack_top:
        .section .note.GNU-stack, "", @progbits
