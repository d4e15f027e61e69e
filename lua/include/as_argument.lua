-- A whole number as the text that a command takes. `..` would make 1.7954522981301e+15 of it, and to pass the number
-- itself is slow: the server formats it with 17 digits.
local function as_argument(number)
  return string.format('%d', number)
end
