-- A whole number as the text that a command takes. `..` would turn it into 1.7954522981301e+15, and passing the number
-- itself is slow: the server formats it with 17 digits.
local function as_argument(number)
  return string.format('%d', number)
end
